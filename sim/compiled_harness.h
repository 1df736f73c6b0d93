// What stands around every compiled circuit: random numbers, its clock, and a run that ends when a rule is broken.

#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>

struct Random {  // xorshift64*
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9E3779B97F4A7C15u ^ 0xD1B54A32D192ED03u) {
    if (!state) state = 1;
  }
  uint32_t below(uint32_t limit) {
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return uint32_t(((state * 0x2545F4914F6CDD1Du) >> 33) % limit);
  }
  bool chance(uint64_t of_256) { return of_256 && below(256) < of_256; }
};

struct Run {
  uint64_t cycle = 0;
  std::string error;  // the first rule that was broken, and when; nothing moves any more

  void fail(const char *form, ...) {
    if (!error.empty()) return;
    char text[600];
    va_list arguments;
    va_start(arguments, form);
    vsnprintf(text, sizeof text, form, arguments);
    va_end(arguments);
    error = "cycle " + std::to_string(cycle) + ": " + text;
  }

  template <class Top>
  void edge(Top &top) {
    top.clk = 0;
    top.eval();
    top.clk = 1;
    top.eval();
    cycle++;
  }
};

// The card as sim/compiled_card.cpp wants it, with every signal of every cycle written to an FST file. Takes the place of the Vcard.h that
// Verilator makes; the model is Vwaves. A cycle is 8 ns long, the period of the clock that the card is made for.

#pragma once

#include <string>

#include "Vwaves.h"
#include "verilated_fst_c.h"

inline std::string &waves_path() {
  static std::string path;
  return path;
}

// Where the next card that is opened writes.
extern "C" void card_waves(const char *path) { waves_path() = path; }

class Vcard : public Vwaves {
 public:
  explicit Vcard(VerilatedContext *context) : Vwaves(traced(context), "card") {
    trace(&file, 99);
    file.set_time_unit("1ns");
    file.set_time_resolution("1ns");
    file.open(waves_path().c_str());
  }

  void eval() {
    Vwaves::eval();
    file.dump(now += 4);
  }

 private:
  static VerilatedContext *traced(VerilatedContext *context) {
    context->traceEverOn(true);
    return context;
  }

  VerilatedFstC file;
  uint64_t now = 0;
};

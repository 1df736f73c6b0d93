// What stands around a ring engine of one function and one port: a memory behind its ring accesses, a back end that finishes what it gets.
//
// The engine (Verilated, 64 bits, ports of sim/compiled_rings.py's wrapper) has the bytes from `base` on; elsewhere memory reads as 0 and
// forgets. A read is answered after a latency, with memory as it was when it came or as it is then, in any order; a write lands when its
// data has come. Every access is kept. A chain is finished, whole, a while after it came.
//
// A rule that the engine breaks ends the run: `error` says which, and nothing moves any more. Every call returns.

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "Vrings.h"
#include "compiled_harness.h"
#include "verilated.h"

namespace {

constexpr uint64_t PAGE = 4096, BLOCK = 64;
constexpr unsigned QUIET = 128;  // cycles in which nothing moves at any port: the engine is idle
enum List { READABLE, WRITABLE };

struct Options {  // as _Options in sim/compiled_rings.py
  uint64_t latency, jitter, stalls, seed, base, size;
};

struct Command {  // as COMMAND in sim/compiled_rings.py
  uint64_t descriptor, driver, device;
  uint32_t operation, queue, size, rules;
};

struct Access {  // as ACCESS in sim/compiled_rings.py
  uint64_t cycle, address;
  uint32_t length, is_write;
  uint8_t data[BLOCK];
};

struct Segment {  // as SEGMENT in sim/compiled_rings.py
  uint64_t address;
  uint32_t length, list, is_last, padding;
};

struct Chain {  // as CHAIN in sim/compiled_rings.py
  uint64_t cycle;
  uint32_t queue, readable, writable, padding;
};

struct Beat {
  uint64_t data;
  uint32_t cookie;
  uint8_t keep, first, last;
};

class Rings : public Run {
 public:
  Rings(const Options &options, uint8_t *memory) : options(options), random(options.seed), top(&context), memory(memory) {
    top.notifications_ready = top.chains_0_ready = top.readable_0_ready = top.writable_0_ready = top.hints_ready = 1;
    edge(top);
  }
  ~Rings() { top.final(); }

  // Let cycles pass, at most until all is at rest; returns how many.
  uint64_t run(uint64_t cycles) {
    const uint64_t begun = cycle;
    idle = 0;
    while (cycle - begun < cycles && error.empty() && idle < QUIET) step();
    return cycle - begun;
  }

  void command(const Command &one) { commands.push_back(one); }
  void kick(unsigned queue) { kicks.push_back(queue); }

  // Stop the function, forget what the back end has, and let the function go again; returns the cycles that it took, or `limit`.
  uint64_t stop(uint64_t limit) {
    const uint64_t begun = cycle;
    top.stop_0 = 1;
    do {
      step();
      work.clear();
    } while (!(top.stopped_0 && reads.empty() && beats.empty() && !finishing) && cycle - begun < limit && error.empty());
    top.stop_0 = 0;
    step();
    step();
    return cycle - begun;
  }

  void forget() { accesses.clear(), segments.clear(), chains.clear(), breaks = notes = 0; }
  unsigned is_idle() const { return top.idle; }

  Options options;
  std::vector<Access> accesses;
  std::vector<Segment> segments;
  std::vector<Chain> chains;
  uint64_t breaks = 0, notes = 0;  // pulses of needs_reset; notifications

 private:
  // One cycle: what is transferred in it, then the inputs of the next, which the wrapper's registers hold.
  void step() {
    bool moves = !reads.empty() || !beats.empty() || writing || ended || !commands.empty() || !kicks.empty() || !work.empty();
    if (commanding && top.commands_ready) commands.pop_front(), commanding = false;
    if (kicking && top.kicks_ready) kicks.pop_front(), kicking = false;
    if (top.needs_reset_0) breaks++, moves = true;
    if (top.notifications_valid) notes++, moves = true;
    if (top.readable_0_valid)
      segments.push_back(Segment{top.readable_0_address, top.readable_0_length_bytes, READABLE, top.readable_0_last, 0});
    if (top.writable_0_valid)
      segments.push_back(Segment{top.writable_0_address, top.writable_0_length_bytes, WRITABLE, top.writable_0_last, 0});
    if (top.chains_0_valid) {
      chains.push_back(Chain{cycle, top.chains_0_queue, top.chains_0_readable_bytes, top.chains_0_writable_bytes, 0});
      work.emplace_back(cycle + random.below(80), top.chains_0_writable_bytes);
    }
    if (finishing && top.finished_0_ready) {
      finishing = false;
      if (!work.empty()) work.pop_front();
    }
    if (top.bursts_0_valid && takes_bursts) burst(), moves = true;
    if (ended && top.write_done_0_ready) ended = false;
    if (top.write_data_0_valid && takes_data) written(), moves = true;
    if (answering && top.read_data_0_ready) beats.pop_front(), answering = false;
    idle = moves ? 0 : idle + 1;
    while (!reads.empty() && reads.begin()->first.first <= cycle) {
      answer(reads.begin()->second);
      reads.erase(reads.begin());
    }
    offer();
    edge(top);
  }

  void offer() {
    commanding = !commands.empty();
    top.commands_valid = commanding;
    if (commanding) {
      const Command &one = commands.front();
      top.commands_operation = one.operation, top.commands_queue = one.queue, top.commands_size = one.size;
      top.commands_rules = one.rules, top.commands_descriptor_iova = one.descriptor;
      top.commands_driver_iova = one.driver, top.commands_device_iova = one.device;
    }
    kicking = !kicks.empty() && !commanding;
    top.kicks_valid = kicking;
    if (kicking) top.kicks_payload = kicks.front();
    finishing = finishing || (!work.empty() && work.front().first <= cycle);
    top.finished_0_valid = finishing;
    if (finishing && !work.empty()) top.finished_0_length_bytes = work.front().second;
    top.bursts_0_ready = takes_bursts = !writing && !random.chance(options.stalls);
    top.write_data_0_ready = takes_data = writing && !ended && !random.chance(options.stalls);
    answering = answering || (!beats.empty() && !random.chance(options.stalls));
    top.read_data_0_valid = answering;
    if (answering) {
      const Beat &beat = beats.front();
      top.read_data_0_data = beat.data, top.read_data_0_keep = beat.keep, top.read_data_0_cookie = beat.cookie;
      top.read_data_0_first = beat.first, top.read_data_0_last = beat.last;
    }
    top.write_done_0_valid = ended;
  }

  uint8_t *place(uint64_t address, uint64_t length) {
    const uint64_t at = address - options.base;
    return at < options.size && length <= options.size - at ? memory + at : nullptr;
  }

  void burst() {
    const uint64_t address = top.bursts_0_address, length = top.bursts_0_length_bytes;
    const bool is_write = top.bursts_0_is_write;
    if (!length || length > BLOCK || address / BLOCK != (address + length - 1) / BLOCK)
      return fail("a burst of %llu bytes at %#llx", (unsigned long long)length, (unsigned long long)address);
    Access one{cycle, address, uint32_t(length), is_write, {}};
    if (is_write) {
      store = one;
      cookie_of_write = top.bursts_0_cookie;
      writing = true;
      come = 0;
    } else {
      const uint64_t wait = options.latency + (options.jitter ? random.below(uint32_t(options.jitter) + 1) : 0);
      if (const uint8_t *bytes = place(address, length)) memcpy(one.data, bytes, length);
      accesses.push_back(one);
      reads.emplace(std::make_pair(cycle + wait, order++), Read{one, uint32_t(top.bursts_0_cookie), random.below(2) != 0});
    }
  }

  struct Read {
    Access of;  // with what was there when it came
    uint32_t cookie;
    bool is_late;
  };

  void answer(const Read &read) {
    Access one = read.of;
    if (read.is_late)
      if (const uint8_t *bytes = place(one.address, one.length)) memcpy(one.data, bytes, one.length);
    for (uint32_t at = 0; at < one.length;) {
      const unsigned low = (one.address + at) % 8;
      const uint32_t count = 8 - low < one.length - at ? 8 - low : one.length - at;
      uint64_t data = 0;
      memcpy(reinterpret_cast<uint8_t *>(&data) + low, one.data + at, count);
      beats.push_back(Beat{data, read.cookie, uint8_t(((1u << count) - 1) << low), at == 0, at + count == one.length});
      at += count;
    }
  }

  void written() {
    const unsigned low = (store.address + come) % 8;
    unsigned count = 8 - low;
    if (count > store.length - come) count = store.length - come;
    const bool is_last = come + count == store.length;
    if (top.write_data_0_keep != ((1u << count) - 1) << low || top.write_data_0_last != is_last || top.write_data_0_first != (come == 0))
      return fail("keep %#x, first %d, last %d at byte %u of a write", top.write_data_0_keep, top.write_data_0_first,
                  top.write_data_0_last, come);
    const uint64_t data = uint64_t(top.write_data_0_data) >> 8 * low;
    memcpy(store.data + come, &data, count);
    come += count;
    if (!is_last) return;
    if (uint8_t *bytes = place(store.address, store.length)) memcpy(bytes, store.data, store.length);
    accesses.push_back(store);
    writing = false;
    top.write_done_0_cookie = cookie_of_write;
    ended = true;
  }

  Random random;
  VerilatedContext context;
  Vrings top;
  uint8_t *memory;
  std::deque<Command> commands;
  std::deque<unsigned> kicks;
  std::map<std::pair<uint64_t, uint64_t>, Read> reads;  // by (cycle in which it is answered, order)
  std::deque<Beat> beats;
  std::deque<std::pair<uint64_t, uint32_t>> work;  // chains of the back end: when each is finished, with how many bytes
  Access store;
  uint64_t order = 0;
  unsigned come = 0, cookie_of_write = 0, idle = 0;
  bool commanding = false, kicking = false, finishing = false, takes_bursts = false, takes_data = false, answering = false;
  bool writing = false, ended = false;
};

}  // namespace

extern "C" {

Rings *rings_open(const Options *options, uint8_t *memory) { return new Rings(*options, memory); }
void rings_close(Rings *rings) { delete rings; }
const char *rings_error(Rings *rings) { return rings->error.empty() ? nullptr : rings->error.c_str(); }
uint64_t rings_run(Rings *rings, uint64_t cycles) { return rings->run(cycles); }
uint64_t rings_stop(Rings *rings, uint64_t limit) { return rings->stop(limit); }
void rings_command(Rings *rings, const Command *command) { rings->command(*command); }
void rings_kick(Rings *rings, uint32_t queue) { rings->kick(queue); }
uint32_t rings_idle(Rings *rings) { return rings->is_idle(); }
uint64_t rings_breaks(Rings *rings) { return rings->breaks; }
uint64_t rings_notes(Rings *rings) { return rings->notes; }
uint64_t rings_accesses(Rings *rings, const Access **found) { return *found = rings->accesses.data(), rings->accesses.size(); }
uint64_t rings_segments(Rings *rings, const Segment **found) { return *found = rings->segments.data(), rings->segments.size(); }
uint64_t rings_chains(Rings *rings, const Chain **found) { return *found = rings->chains.data(), rings->chains.size(); }
void rings_forget(Rings *rings) { rings->forget(); }

}  // extern "C"

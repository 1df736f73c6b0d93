// The line of a card behind a tunnel: bytes, or a serial line bit by bit, which may spoil what goes through it.
//
// The card (Verilated, ports of sim/tunnel_lines.py's wrapper) knows nothing of it. What comes from the host waits until the line carries it;
// what comes from the card is kept for the host. Every call returns.

#include <cstdint>
#include <deque>
#include <vector>

#include "Vtunnel.h"
#include "compiled_harness.h"
#include "verilated.h"

namespace {

constexpr uint8_t FLAG = 0x7E;
constexpr unsigned BITS = 10;  // of a byte: start, eight, stop

struct Options {  // as _Options in sim/tunnel_lines.py
  uint64_t divisor;              // cycles per bit, 0: bytes
  uint64_t seed;
  uint64_t turned, lost, twice;  // in how many of 2^24 bits, bytes, bytes
  uint64_t unplugged;
};

class Tunnel : public Run {
 public:
  explicit Tunnel(const Options &options) : options(options), random(options.seed), top(&context) {
    top.is_serial = options.divisor != 0;
    top.rx_pin = 1;
  }
  ~Tunnel() { Verilated::threadContextp(&context); }  // where the scopes of `top` are looked for when it ends

  void feed(const uint8_t *data, uint64_t count) {
    for (uint64_t n = 0; n < count && !options.unplugged; n++) spoil(to_card, data[n]);
  }

  // Let `cycles` pass, or with `until_frame` fewer: up to the end of what may be a frame. Returns how many.
  uint64_t run(uint64_t cycles, bool until_frame) {
    const uint64_t begin = cycle;
    bool is_over = false;
    while (!is_over && cycle - begin < cycles) {
      options.divisor ? drive_pin() : drive_bytes();
      edge(top);
      is_over = (options.divisor ? sample_pin() : sample_bytes()) && until_frame;
    }
    return cycle - begin;
  }

  Options options;
  std::vector<uint8_t> from_card;

 private:
  bool happens(uint64_t chance) { return chance && random.below(1 << 24) < chance; }

  template <class Bytes>
  void spoil(Bytes &bytes, uint8_t byte) {
    if (!options.divisor && happens(8 * options.turned)) byte ^= uint8_t(1 << random.below(8));
    if (happens(options.lost)) return;
    bytes.push_back(byte);
    if (happens(options.twice)) bytes.push_back(byte);
  }

  uint8_t next() {
    const uint8_t byte = to_card.front();
    to_card.pop_front();
    return byte;
  }

  void drive_bytes() {
    top.rx_valid = !to_card.empty();
    if (top.rx_valid) top.rx = next();
  }

  void drive_pin() {
    if (left && --left) return;
    if (bits <= 1) {
      if (to_card.empty() || options.unplugged) {
        top.rx_pin = 1, left = 0;
        return;
      }
      bits = next() << 1 | 3u << (BITS - 1);
    }
    top.rx_pin = (bits & 1) ^ happens(options.turned);
    bits >>= 1, left = options.divisor;
  }

  bool arrived(uint8_t byte) {
    if (options.unplugged) return false;
    spoil(from_card, byte);
    const bool ends = byte == FLAG && latest != FLAG;
    latest = byte;
    return ends;
  }

  bool sample_bytes() { return top.tx_valid && arrived(top.tx); }

  bool sample_pin() {
    if (!waiting) {
      if (!top.tx_pin) waiting = options.divisor / 2 + 1, count = 0;
      if (!waiting) return false;
    }
    if (--waiting) return false;
    shift = shift >> 1 | ((top.tx_pin ^ happens(options.turned)) & 1) << (BITS - 1);
    if (++count < BITS) {
      waiting = options.divisor;
      return false;
    }
    return shift >> (BITS - 1) && arrived(uint8_t(shift >> 1));
  }

  Random random;
  VerilatedContext context;
  Vtunnel top;
  std::deque<uint8_t> to_card;
  uint64_t left = 0, waiting = 0;  // cycles of this bit, cycles until the next sample
  unsigned bits = 1, shift = 0, count = 0;
  uint8_t latest = FLAG;
};

}  // namespace

extern "C" {

Tunnel *tunnel_open(const Options *options) { return new Tunnel(*options); }
void tunnel_close(Tunnel *tunnel) { delete tunnel; }
Options *tunnel_options(Tunnel *tunnel) { return &tunnel->options; }
uint64_t tunnel_cycle(Tunnel *tunnel) { return tunnel->cycle; }
void tunnel_feed(Tunnel *tunnel, const uint8_t *data, uint64_t count) { tunnel->feed(data, count); }
uint64_t tunnel_run(Tunnel *tunnel, uint64_t cycles, int until_frame) { return tunnel->run(cycles, until_frame); }

// Point to the bytes that came since the last call of tunnel_forget; returns how many.
uint64_t tunnel_bytes(Tunnel *tunnel, const void **data) {
  *data = tunnel->from_card.data();
  return tunnel->from_card.size();
}
void tunnel_forget(Tunnel *tunnel) { tunnel->from_card.clear(); }

}  // extern "C"

// The far end of a compiled card's raw TLP link: a host bridge with guest memory, without any software.
//
// The card (Verilated, ports of sim/compiled.py's wrapper) sends TLPs. Memory writes land in guest memory in the cycle in which
// they end; memory reads are served from it after a latency, completions cut as the rules allow. Everything else (completions,
// interrupts, messages) is news for the caller, in order: by the time that it is seen, every earlier write has landed.
// [PCIe5 2.2, 2.3, 2.4.1]
//
// A rule that the card breaks ends the run: `error` says which, and nothing moves any more. Every call returns.

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "Vcard.h"
#include "compiled_harness.h"
#include "compiled_wire.h"
#include "verilated.h"

namespace {

constexpr unsigned LANES = CARD_WIDTH / 32;
constexpr uint32_t ALL_LANES = LANES == 32 ? ~0u : (1u << LANES) - 1;
constexpr uint64_t PAGE = 4096;
constexpr unsigned MAX_DW = 4 + 1024 + 1;
constexpr uint64_t NOTICED = 4;  // cycles from the end of link_reset until the card has certainly broken off what it sent
constexpr int64_t LINK_RATE = CARD_WIDTH / 8 * 63;  // 64ths of a byte per cycle: lanes of 8 GT/s carry 63 of 64 bytes of the card's
constexpr uint32_t FRAMING = 8;                     // bytes of every TLP on the link: framing, sequence number, LCRC
constexpr int64_t LINK_BUFFER = 512;                // bytes that either end holds for the link
constexpr uint32_t IS_4DW = 1u << 29, HAS_DATA = 1u << 30, HAS_PREFIX = 1u << 31;
constexpr uint32_t ATTRIBUTES = 3u << 12, RELAXED = 1u << 13, NO_SNOOP = 1u << 12;
constexpr uint32_t CPL = 0x0Au << 24, CPLD = 0x4Au << 24;
constexpr uint32_t UNSUPPORTED = 1;  // completion status
enum Split { FARTHEST, EVERY_BOUNDARY, ANY_BOUNDARY };

enum : uint32_t { UNTIL_NEWS = 1, ALSO_IDLE = 2 };  // of card_run

typedef std::vector<uint32_t> Dwords;

struct Options {  // as Options in sim/compiled.py
  uint64_t latency, jitter, seed, rcb, stalls, idle_after, split, replaying, late_writes, paced;
  uint64_t window, window_size;  // writes here are interrupts
};

struct Counts {  // as Counts in sim/compiled.py
  uint64_t sent, received, sent_dwords, received_dwords, reads, read_bytes, writes, written_bytes, refused_reads, dropped_writes, interrupts;
  uint64_t lost_pages;  // of files that shrank
};

struct Limits {  // what a function may do; as Limits in sim/compiled.py
  uint32_t known, may_read, may_write, mps, payload, mrrs, tags, attributes;
};

struct Mapping {
  std::shared_ptr<uint8_t> base;  // its deleter takes the whole mapping away
  uint8_t *host;
  uint64_t size;
  bool card_reads, card_writes, is_writable;
};

struct Read {
  uint32_t dw0, dw1;
  uint64_t address;  // of the first dword
};

struct Outgoing {
  Dwords dwords;
  uint64_t due;
  int64_t ends;  // key of the read that this completion ends, -1 without one
};

struct News {
  uint64_t cycle;
  Dwords dwords;
};

typedef int (*Observer)(int is_sent, uint64_t cycle, uint32_t count, const uint32_t *dwords);

unsigned lowest(uint32_t enables) { return __builtin_ctz(enables); }
unsigned highest(uint32_t enables) { return 31 - __builtin_clz(enables); }
bool runs_up(uint32_t enables) { return enables == 15 || enables == 14 || enables == 12 || enables == 8; }
bool runs_down(uint32_t enables) { return enables == 15 || enables == 7 || enables == 3 || enables == 1; }

// Copy so that an aligned piece of 2, 4 or 8 bytes is never seen in halves by a guest that runs beside us.
void copy(uint8_t *to, const uint8_t *from, uint64_t size) {
  auto aligned = [&](uint64_t n) { return ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & (n - 1)) == 0; };
  if (size == 8 && aligned(8)) *(volatile uint64_t *)to = *(const volatile uint64_t *)from;
  else if (size == 4 && aligned(4)) *(volatile uint32_t *)to = *(const volatile uint32_t *)from;
  else if (size == 2 && aligned(2)) *(volatile uint16_t *)to = *(const volatile uint16_t *)from;
  else memcpy(to, from, size);
}

// A file that shrinks while it is mapped takes its pages along, and whoever touches one gets SIGBUS. Such a page becomes one of
// zeroes, and is counted.
struct Range {
  uint64_t size;
  Counts *counts;
};

struct {
  std::map<uintptr_t, Range> mapped;  // nobody changes it while memory is touched
  struct sigaction before;
} files;

void on_bus_error(int number, siginfo_t *info, void *context) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  auto next = files.mapped.upper_bound(at);
  if (next != files.mapped.begin()) {
    const auto &[start, range] = *std::prev(next);
    void *page = reinterpret_cast<void *>(at & ~uintptr_t(PAGE - 1));
    if (at - start < range.size && mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == page) {
      range.counts->lost_pages++;
      return;
    }
  }
  // None of ours: it goes, or comes again, to whom it would have gone.
  if (files.before.sa_flags & SA_SIGINFO) files.before.sa_sigaction(number, info, context);
  else sigaction(SIGBUS, &files.before, nullptr);
}

void watch_files() {
  static bool is_watching = false;
  if (is_watching) return;
  struct sigaction ours {};
  ours.sa_sigaction = on_bus_error, ours.sa_flags = SA_SIGINFO;
  is_watching = !sigaction(SIGBUS, &ours, &files.before);
}

class Card : public Run {
 public:
  explicit Card(const Options &chosen) : options(chosen), timing(chosen.seed), stalling(chosen.seed + 1), top(&context) {
    open_reads.resize(256 << 10);
    limits.resize(256);
    top.i_valid = 0, top.o_ready = 0, top.link_reset = 0, top.clk = 0;
    top.eval();
    edge(top);
    cycle = 0;
  }

  ~Card() {
    top.final();
    if (log) fclose(log);
  }

  uint64_t run(uint64_t cycles, uint32_t flags) {
    const uint64_t begin = cycle;
    exchange();
    while (cycle - begin < cycles && error.empty()) {
      if ((flags & UNTIL_NEWS) && !news.empty()) break;
      if (!(flags & ALSO_IDLE) && idle >= options.idle_after) break;
      step();
    }
    exchange();
    return cycle - begin;
  }

  bool is_idle() const { return idle >= options.idle_after; }

  // The link is down for `cycles` and as many more as the card takes to notice: what is on it is lost, nobody knows functions.
  void reset_link(uint64_t cycles) {
    for (; !late.empty(); late.pop_front()) land(late.front().dwords);  // these had come
    queue.clear(), reads.clear(), news.clear(), arriving.clear();
    open_reads.assign(open_reads.size(), false);
    limits.assign(limits.size(), Limits{});
    offering = stalled = taking = false;
    parts = 0, owed_down = owed_up = 0, idle = 0;
    top.i_valid = 0, top.o_ready = 0;
    for (uint64_t n = 0; n < cycles + NOTICED; n++) {
      top.link_reset = n < cycles;
      edge(top);
    }
  }

  void send(const uint32_t *dwords, uint32_t count, uint64_t due, int64_t ends = -1) {
    queue.push_back(Outgoing{Dwords(dwords, dwords + count), due, ends});
    idle = 0;
  }

  void exchange() {
#ifdef CARD_WIRE
    if (wire.exchange()) idle = 0;
#endif
  }

  // -- guest memory --

  // Have the calls below concern the memory of `function` alone, or (negative) the one that all others share.
  bool select(int function) {
    const int space = function < 0 ? 0 : 1 + function;
    if (space > 256) return false;
    memory = &spaces[space];
    return true;
  }

  // From now on the function reaches only its own memory, or (off) the one that is shared.
  void separate(uint32_t function, bool is_own) { space_of[function & 255] = is_own ? 1 + (function & 255) : 0; }

  int map(uint64_t address, uint64_t size, int fd, uint64_t offset, bool card_reads, bool card_writes) {
    if (!size || address + (size - 1) < address) return EINVAL;
    auto next = memory->lower_bound(address);
    if (next != memory->end() && next->first - address < size) return EEXIST;
    if (next != memory->begin()) {
      auto before = std::prev(next);
      if (address - before->first < before->second.size) return EEXIST;
    }
    bool is_writable = true;
    void *at;
    if (fd < 0) {
      at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    } else {
      struct stat file;
      if (fstat(fd, &file)) return errno;
      if (offset + size < offset || uint64_t(file.st_size) < offset + size) return ENXIO;  // behind its end there is SIGBUS
      const int access = fcntl(fd, F_GETFL) & O_ACCMODE;
      is_writable = access == O_RDWR;
      if (card_writes && !is_writable) return EACCES;
      at = mmap(nullptr, size, PROT_READ | (is_writable ? PROT_WRITE : 0), MAP_SHARED, fd, off_t(offset));
    }
    if (at == MAP_FAILED) return errno;
    watch_files();
    files.mapped[reinterpret_cast<uintptr_t>(at)] = Range{size, &counts};
    std::shared_ptr<uint8_t> base(static_cast<uint8_t *>(at), [size](uint8_t *p) {
      files.mapped.erase(reinterpret_cast<uintptr_t>(p));
      munmap(p, size);
    });
    (*memory)[address] = Mapping{base, base.get(), size, card_reads, card_writes, is_writable};
    return 0;
  }

  // Take away what is mapped from `address` to `last`; pieces beside it stay. Returns the bytes that were mapped.
  uint64_t unmap(uint64_t address, uint64_t last) {
    uint64_t gone = 0;
    auto one = memory->upper_bound(address);
    if (one != memory->begin()) --one;
    while (one != memory->end() && one->first <= last) {
      const uint64_t start = one->first, end = start + (one->second.size - 1);
      if (end < address) {
        ++one;
        continue;
      }
      const Mapping old = one->second;
      one = memory->erase(one);
      const uint64_t from = start < address ? address : start, to = end > last ? last : end;
      gone += to - from + 1;
      if (from > start) {
        Mapping left = old;
        left.size = from - start;
        (*memory)[start] = left;
      }
      if (to < end) {
        Mapping right = old;
        right.host += to + 1 - start;
        right.size = end - to;
        (*memory)[to + 1] = right;
      }
    }
    return gone;
  }

  // Whether all of it is there for this kind of access.
  template <typename May>
  bool reaches(uint64_t address, uint64_t size, May may) {
    while (size) {
      Mapping *m = find(address);
      if (!m || !may(*m)) return false;
      const uint64_t here = room(address, size);
      address += here, size -= here;
    }
    return true;
  }

  void load(uint64_t address, uint8_t *to, uint64_t size) {
    std::atomic_thread_fence(std::memory_order_acquire);
    while (size) {
      const uint8_t *from = find(address)->host + (address - found_at);
      const uint64_t here = room(address, size);
      copy(to, from, here);
      to += here, address += here, size -= here;
    }
  }

  void store(uint64_t address, const uint8_t *from, uint64_t size) {
    std::atomic_thread_fence(std::memory_order_release);
    while (size) {
      uint8_t *to = find(address)->host + (address - found_at);
      const uint64_t here = room(address, size);
      copy(to, from, here);
      from += here, address += here, size -= here;
    }
  }

  int read(uint64_t address, uint8_t *to, uint64_t size) {
    if (!reaches(address, size, [](const Mapping &) { return true; })) return EFAULT;
    load(address, to, size);
    return 0;
  }

  int write(uint64_t address, const uint8_t *from, uint64_t size) {
    if (!reaches(address, size, [](const Mapping &m) { return m.is_writable; })) return EFAULT;
    store(address, from, size);
    idle = 0;
    return 0;
  }

  // -- the log --

  int record(const char *path) {
    if (log && fclose(log)) return errno;
    log = nullptr;
    if (!path) return 0;
    log = fopen(path, "w");
    if (!log) return errno;
    setvbuf(log, nullptr, _IOFBF, 1 << 16);
    return 0;
  }

  void write_line(const char *line) {
    if (log && (fputs(line, log) < 0 || fputc('\n', log) < 0)) fail("the log cannot be written: %s", strerror(errno));
  }

  int flush() { return log && fflush(log) ? errno : 0; }

  Options options;
  Counts counts = {};
  std::vector<Limits> limits;
  std::deque<News> news;
  Observer observer = nullptr;
  FILE *log = nullptr;
#ifdef CARD_WIRE
  Wire<LANES + 1> wire;
#endif

 private:
  // What the link has not carried yet of the TLPs given to it, in 64ths of a byte.
  static void charge(int64_t &owed, uint64_t dwords) { owed += int64_t(64 * (4 * dwords + FRAMING)); }

  static void drain(int64_t &owed) { owed = owed > 0 ? owed - LINK_RATE : 0; }

  bool is_carried(int64_t owed) const { return !options.paced || owed <= 64 * LINK_BUFFER; }

  // One cycle: what is transferred in it, then the inputs of the next. The wrapper registers the inputs: they hold from just
  // after the edge, as a register of the link adapter would have them.
  void step() {
    bool busy = false;
    while (!late.empty() && late.front().cycle <= cycle) {
      land(late.front().dwords);
      late.pop_front();
    }
    if (offering) {
      busy = true;
      if (top.i_ready) taken();
    }
    if (top.o_valid) {
      busy = true;
      beat();
    } else if (stalled) {
      fail("valid was withdrawn from a stalled beat");
    }
    if (!reads.empty()) {
      busy = true;
      while (!reads.empty() && reads.begin()->first.first <= cycle) {
        const Read read = reads.begin()->second;
        reads.erase(reads.begin());
        serve(read);
      }
    }
    if (!queue.empty() || !late.empty() || parts) busy = true;
#ifdef CARD_WIRE
    if (wire.step(top)) busy = true;
#endif
    idle = busy ? 0 : idle + 1;
    drain(owed_down), drain(owed_up);
    offer();
    taking = (parts || is_carried(owed_up)) && (!options.stalls || stalling.below(256) >= options.stalls);
    top.o_ready = taking;
    edge(top);
  }

  void offer() {
    if (!offering && !queue.empty() && queue.front().due <= cycle + 1 && is_carried(owed_down)) {
      offering = true;
      charge(owed_down, queue.front().dwords.size());
      offered_at = cycle + 1;
      sent_lanes = 0;
    }
    if (!offering) {
      top.i_valid = 0;
      return;
    }
    const Dwords &dwords = queue.front().dwords;
    const unsigned left = unsigned(dwords.size()) - sent_lanes, here = left < LANES ? left : LANES;
    for (unsigned n = 0; n < LANES; n++) top.i_payload[n] = n < here ? dwords[sent_lanes + n] : 0;
    const uint32_t keep = here == LANES ? ALL_LANES : (1u << here) - 1;
    top.i_payload[LANES] = keep | uint32_t(sent_lanes == 0) << LANES | uint32_t(left <= LANES) << (LANES + 1);
    top.i_valid = 1;
  }

  // The beat that is offered is taken in this cycle.
  void taken() {
    Outgoing &out = queue.front();
    sent_lanes += LANES;
    if (sent_lanes < out.dwords.size()) return;
    counts.sent++;
    counts.sent_dwords += out.dwords.size();
    if (out.ends >= 0) open_reads[out.ends] = false;
    const uint64_t beats = (out.dwords.size() + LANES - 1) / LANES;
    if (log && cycle - offered_at + 1 != beats)
      fprintf(log, "{\"event\":\"Note\",\"cycle\":%llu,\"text\":\"offered\"}\n", (unsigned long long)offered_at);
    tell(true, out.dwords);
    queue.pop_front();
    offering = false;
  }

  // The card offers a beat.
  void beat() {
    uint32_t now[LANES + 1];
    for (unsigned n = 0; n <= LANES; n++) now[n] = top.o_payload[n];
    if (stalled && memcmp(now, held, sizeof now)) return fail("a stalled beat changed");
    if (!taking) {
      memcpy(held, now, sizeof now);
      stalled = true;
      return;
    }
    stalled = false;
    const uint32_t keep = now[LANES] & ALL_LANES;
    const bool first = now[LANES] >> LANES & 1, last = now[LANES] >> (LANES + 1) & 1;
    if (first != (parts == 0)) return fail("first is %d on beat %u of a TLP", first, parts);
    if (last ? !keep || (keep & (keep + 1)) : keep != ALL_LANES) return fail("last is %d and keep is %#x on beat %u of a TLP", last, keep, parts);
    const unsigned here = __builtin_popcount(keep);
    if (arriving.size() + here > MAX_DW) return fail("a TLP does not end after %u dwords", MAX_DW);
    arriving.insert(arriving.end(), now, now + here);
    if (first) charge(owed_up, (now[0] & IS_4DW ? 4 : 3) + (now[0] & HAS_DATA ? now[0] & 0x3FF ? now[0] & 0x3FF : 1024 : 0));
    parts++;
    if (!last) return;
    parts = 0;
    counts.received++;
    counts.received_dwords += arriving.size();
    Dwords whole;
    whole.swap(arriving);
    receive(whole);
    if (error.empty()) tell(false, whole);
  }

  void tell(bool is_sent, const Dwords &dwords) {
    if (log) {
      fprintf(log, "{\"event\":\"%s\",\"cycle\":%llu,\"dwords\":\"", is_sent ? "TlpSent" : "TlpReceived", (unsigned long long)cycle);
      for (size_t n = 0; n < dwords.size(); n++) fprintf(log, n ? " %08x" : "%08x", dwords[n]);
      if (fputs("\"}\n", log) < 0) fail("the log cannot be written: %s", strerror(errno));
    }
    if (observer && observer(is_sent, cycle, uint32_t(dwords.size()), dwords.data())) fail("the observer stopped the run");
  }

  void broken(const char *rule, const Dwords &dwords) {
    std::string text;
    char one[12];
    for (size_t n = 0; n < dwords.size() && n < 8; n++) snprintf(one, sizeof one, " %08x", dwords[n]), text += one;
    fail("%s: TLP of %zu dwords%s", rule, dwords.size(), text.c_str());
  }

  void receive(const Dwords &d) {
    const uint32_t dw0 = d[0], kind = dw0 >> 24 & 31;
    if (dw0 & HAS_PREFIX) return broken("malformed: prefix or reserved Fmt", d);
    if (kind == 0x0A || kind >> 3 == 2) {  // completions, messages
      news.push_back(News{cycle, d});
      return;
    }
    if (kind) return broken("a card does not send this request", d);
    const bool is_write = dw0 & HAS_DATA, is_wide = dw0 & IS_4DW;
    const uint32_t length = dw0 & 0x3FF ? dw0 & 0x3FF : 1024, header = is_wide ? 4 : 3;
    if (d.size() != header + (is_write ? length : 0)) return broken("malformed: length is not that of the header", d);
    const uint32_t dw1 = d[1], function = dw1 >> 16, tag = dw1 >> 8 & 255, first = dw1 & 15, last = dw1 >> 4 & 15;
    if (is_wide && !d[2]) return broken("malformed: a header of 4 dwords for an address below 4 GiB", d);
    const uint64_t address = is_wide ? uint64_t(d[2]) << 32 | (d[3] & ~3u) : d[2] & ~3u;
    if (d[header - 1] & 3) return broken("processing hint is set", d);
    if (length == 1 ? last != 0 : !first || !last) return broken("malformed: byte enables", d);
    if (length > 1 && (!runs_up(first) || !runs_down(last)) && (length > 2 || address % 8)) return broken("malformed: byte enables have gaps", d);
    if (address % PAGE + 4 * length > PAGE) return broken("malformed: request crosses 4 KiB", d);
    if (dw0 & 0x00FFFC00 & ~ATTRIBUTES) return broken("traffic class, address type, poison, digest or reserved bits are set", d);
    if (options.replaying) return;  // what it may do and what it gets is in the log
    const Limits &may = limits[function & 255];
    if (!may.known || function >> 8 != bus) return broken("requester ID is of no function of the card", d);
    if (dw0 & ATTRIBUTES & ~may.attributes) return broken("attributes are not enabled", d);
    if (is_write) {
      if (!may.may_write) return broken("write without bus master", d);
      if (4 * length > may.mps) return broken("payload is longer than Max_Payload_Size", d);
      if (address - options.window < options.window_size) {
        if (length != 1 || first != 15) return broken("interrupt is not one write of one whole dword", d);
        counts.interrupts++;
        news.push_back(News{cycle, d});
      } else if (options.late_writes) {
        late.push_back(News{cycle + options.late_writes, d});
      } else {
        land(d);
      }
      return;
    }
    if (!may.may_read) return broken("read without bus master", d);
    if (4 * length > may.mrrs) return broken("read is longer than Max_Read_Request_Size", d);
    if (tag >= may.tags) return broken("tag is wider than enabled", d);
    const uint32_t key = (function & 255) << 10 | tag;
    if (open_reads[key]) return broken("tag is still in use", d);
    open_reads[key] = true;
    uint64_t due = cycle + options.latency;
    if (options.jitter) due += timing.below(uint32_t(options.jitter) + 1);  // so answers overtake each other
    reads.emplace(std::make_pair(due, order++), Read{dw0, dw1, address});
  }

  // The memory that a function of the card reaches is the one that is looked at, as long as this lives.
  struct Selected {
    Card &card;
    std::map<uint64_t, Mapping> *const before;
    Selected(Card &card, uint32_t function) : card(card), before(card.memory) { card.memory = &card.spaces[card.space_of[function & 255]]; }
    ~Selected() { card.memory = before; }
  };

  // Do a write of the card.
  void land(const Dwords &d) {
    const Selected selected(*this, d[1] >> 16);
    const uint32_t header = d[0] & IS_4DW ? 4 : 3, length = d.size() - header, first = d[1] & 15, last = length > 1 ? d[1] >> 4 & 15 : first;
    const uint64_t address = header == 4 ? uint64_t(d[2]) << 32 | (d[3] & ~3u) : d[2] & ~3u;
    const uint8_t *data = reinterpret_cast<const uint8_t *>(d.data() + header);
    auto may = [](const Mapping &m) { return m.card_writes; };
    counts.writes++;
    if (!first && !last) return;
    if (first && last && ((length > 1 && runs_up(first) && runs_down(last)) || (length == 1 && (first >> lowest(first) & ((first >> lowest(first)) + 1)) == 0))) {
      const uint64_t skip = lowest(first), size = 4 * (length - 1) + highest(last) + 1 - skip;
      if (!reaches(address + skip, size, may)) {
        counts.dropped_writes++;
        return;
      }
      counts.written_bytes += size;
      store(address + skip, data + skip, size);
      return;
    }
    for (int checked = 0; checked < 2; checked++) {
      for (unsigned n = 0; n < 4 * length; n++) {
        const uint32_t enables = n < 4 ? first : n >= 4 * (length - 1) ? last : 15;
        if (!(enables >> n % 4 & 1)) continue;
        if (checked) {
          counts.written_bytes++;
          store(address + n, data + n, 1);
        } else if (!reaches(address + n, 1, may)) {
          counts.dropped_writes++;
          return;
        }
      }
    }
  }

  // Queue the completions of a read with memory as it is now.
  void serve(const Read &read) {
    const Selected selected(*this, read.dw1 >> 16);
    const uint32_t length = read.dw0 & 0x3FF ? read.dw0 & 0x3FF : 1024, first = read.dw1 & 15, last = length > 1 ? read.dw1 >> 4 & 15 : first;
    const uint32_t function = read.dw1 >> 24 << 8 | (read.dw1 >> 16 & 255), tag = read.dw1 >> 8 & 255;
    const int64_t key = int64_t(function & 255) << 10 | tag;
    uint64_t start = read.address, size = 0;
    if (first || last) {
      const uint64_t low = first ? lowest(first) : 4 * (length - 1) + lowest(last);
      const uint64_t high = last ? 4 * (length - 1) + highest(last) : highest(first);
      start += low, size = high + 1 - low;
    }
    counts.reads++;
    counts.read_bytes += size;
    const uint32_t to = (read.dw1 & 0xFFFF0000) | tag << 8, attributes = read.dw0 & ATTRIBUTES;
    uint32_t raw[1024];
    for (unsigned n = 0; n < length; n++) raw[n] = 0xEEEEEEEE;  // what was not asked for: nothing to rely on
    if (!reaches(start, size ? size : 1, [](const Mapping &m) { return m.card_reads; })) {
      counts.refused_reads++;
      const uint32_t refusal[3] = {CPL | attributes, UNSUPPORTED << 13 | (uint32_t(size ? size : 1) & 0xFFF), to | uint32_t(start & 0x7F)};
      return send(refusal, 3, 0, key);
    }
    load(start, reinterpret_cast<uint8_t *>(raw) + (start - read.address), size);
    const uint64_t top = read.address + 4 * length, end = start + size;
    for (uint64_t at = read.address; at != top;) {
      const uint64_t stop = cut(at, top, limits[function & 255].payload), from = at == read.address ? start : at;
      const uint32_t count = (stop - at) / 4;
      uint32_t dwords[3 + 1024] = {CPLD | attributes | (count & 0x3FF), uint32_t(size ? end - from : 1) & 0xFFF, to | uint32_t(from & 0x7F)};
      memcpy(dwords + 3, raw + (at - read.address) / 4, 4 * count);
      send(dwords, 3 + count, 0, stop == top ? key : -1);
      at = stop;
    }
  }

  // Where the completion that starts at `at` ends: at a read completion boundary, or with the request. [PCIe5 2.3.1.1]
  uint64_t cut(uint64_t at, uint64_t top, uint64_t payload) {
    const uint64_t rcb = options.rcb, nearest = at - at % rcb + rcb;
    uint64_t farthest = top - at > payload ? at + payload - (at + payload) % rcb : top;
    if (options.split == EVERY_BOUNDARY) farthest = top - at < nearest - at ? top : nearest;
    if (options.split == ANY_BOUNDARY && farthest - at > nearest - at) {
      const uint64_t places = (farthest - nearest + rcb - 1) / rcb + 1;
      const uint64_t chosen = nearest + rcb * timing.below(uint32_t(places));
      farthest = chosen - at < farthest - at ? chosen : farthest;
    }
    return farthest;
  }

  // The mapping that holds `address`, or null; the last one is looked at first.
  Mapping *find(uint64_t address) {
    auto one = memory->upper_bound(address);
    if (one == memory->begin()) return nullptr;
    --one;
    if (address - one->first >= one->second.size) return nullptr;
    found_at = one->first;
    return &one->second;
  }

  uint64_t room(uint64_t address, uint64_t size) {
    const uint64_t left = find(address)->size - (address - found_at);
    return left < size ? left : size;
  }

 public:
  uint32_t bus = 1;

 private:
  Random timing, stalling;
  VerilatedContext context;
  Vcard top;
  std::vector<std::map<uint64_t, Mapping>> spaces{257};  // 0: shared, 1 + n: of function n alone
  uint32_t space_of[256] = {};
  std::map<uint64_t, Mapping> *memory = &spaces[0];  // the one that is looked at
  uint64_t found_at = 0;
  std::map<std::pair<uint64_t, uint64_t>, Read> reads;  // by (cycle in which it is served, order)
  std::vector<bool> open_reads;
  uint64_t order = 0, idle = 0;
  int64_t owed_down = 0, owed_up = 0;  // to the link, see charge
  std::deque<Outgoing> queue;
  std::deque<News> late;
  bool offering = false, taking = false, stalled = false;
  uint64_t offered_at = 0;
  unsigned sent_lanes = 0, parts = 0;
  uint32_t held[LANES + 1];
  Dwords arriving;
};

}  // namespace

extern "C" {

Card *card_open(const Options *options, uint32_t bus) {
  Card *card = new Card(*options);
  card->bus = bus;
  return card;
}
void card_close(Card *card) { delete card; }
uint64_t card_run(Card *card, uint64_t cycles, uint32_t flags) { return card->run(cycles, flags); }
uint64_t card_cycle(Card *card) { return card->cycle; }
void card_reset_link(Card *card, uint64_t cycles) { card->reset_link(cycles); }
int card_is_idle(Card *card) { return card->is_idle(); }
const char *card_error(Card *card) { return card->error.empty() ? nullptr : card->error.c_str(); }
void card_send(Card *card, const uint32_t *dwords, uint32_t count, uint64_t due) { card->send(dwords, count, due); }
void card_limits(Card *card, uint32_t function, const Limits *limits) { card->limits[function & 255] = *limits; }
Options *card_options(Card *card) { return &card->options; }
Counts *card_counts(Card *card) { return &card->counts; }
void card_observe(Card *card, Observer observer) { card->observer = observer; }
int card_map(Card *card, uint64_t address, uint64_t size, int fd, uint64_t offset, int reads, int writes) {
  return card->map(address, size, fd, offset, reads, writes);
}
int card_select(Card *card, int function) { return card->select(function) ? 0 : EINVAL; }
void card_separate(Card *card, uint32_t function, int is_own) { card->separate(function, is_own); }
uint64_t card_unmap(Card *card, uint64_t address, uint64_t last) { return card->unmap(address, last); }
int card_read(Card *card, uint64_t address, uint8_t *to, uint64_t size) { return card->read(address, to, size); }
int card_write(Card *card, uint64_t address, const uint8_t *from, uint64_t size) { return card->write(address, from, size); }
int card_record(Card *card, const char *path) { return card->record(path); }
void card_line(Card *card, const char *line) { card->write_line(line); }
int card_flush(Card *card) { return card->flush(); }
#ifdef CARD_WIRE
void card_wire(Card *card, int socket) { card->wire.socket = socket; }
#endif

// Copy the oldest news to `dwords` (room for 1029) and forget it; returns its length, 0 without news.
uint32_t card_news(Card *card, uint64_t *cycle, uint32_t *dwords) {
  if (card->news.empty()) return 0;
  const News &one = card->news.front();
  const uint32_t count = uint32_t(one.dwords.size());
  *cycle = one.cycle;
  memcpy(dwords, one.dwords.data(), 4 * count);
  card->news.pop_front();
  return count;
}

}  // extern "C"

// What stands around a stand-alone IOMMU: who asks for translations, a memory behind its wall port, a gate that drains when told.
//
// The IOMMU (Verilated, ports of sim/compiled_iommu.py's wrapper) is asked for one translation after the other, with gaps by seed; each
// has a free cookie, and its answer is kept with the cycles of both. Reads of the wall are answered after a latency, with memory as it
// was when they came or as it is when they are answered; an update (compare and swap) is done in one of these moments, and kept; a write
// lands when its data has come, and is kept. An aligned dword that is written to an interrupt file in memory is handed over when its answer
// has come. A fence ends when all that was accepted before it has been answered and handed over.
//
// A rule that the IOMMU breaks ends the run: `error` says which, and nothing moves any more. Every call returns.

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "Viommu.h"
#include "compiled_harness.h"
#include "verilated.h"

namespace {

constexpr uint64_t PAGE = 4096, BLOCK = 64;
constexpr unsigned COOKIES = 256;
constexpr unsigned QUIET = 64;  // cycles in which nothing moves at any port: the IOMMU is idle
constexpr unsigned MRIF_LOG2 = 9;  // as in rtl/spec/riscv_iommu.py
constexpr unsigned INVALIDATION = 1;  // code of an invalidation request
constexpr unsigned ACCESS_LIMIT = 16;  // cycles of one access of the register bus
enum Status { OK = 0, UR = 2, POISONED = 5 };  // as BurstStatus in rtl/tlp/layouts.py
enum Access { READ, WRITE, EXEC };
enum Atomic { NONE, CAS = 3 };  // as AtomicKind in rtl/tlp/layouts.py

struct Options {  // as _Options in sim/compiled_iommu.py
  uint64_t latency, jitter, gaps, stalls, outstanding, seed, base, size;
};

struct Counts {  // as _Counts in sim/compiled_iommu.py
  uint64_t hits, misses, walks, merged, reads, refused_reads, writes, updates, fences;
};

struct Request {  // as REQUEST in sim/compiled_iommu.py
  uint64_t iova;
  uint32_t device;
  int32_t process;  // -1: none
  uint8_t access, privileged, kind, writes, is_CXL, padding[3];
  uint32_t data;  // of a write, if a dword
};

struct Answer {  // as ANSWER in sim/compiled_iommu.py
  uint64_t page, asked, answered;
  uint16_t cause;
  uint8_t fault, readable, writable, size_log2, PBMT;
  uint8_t stored;  // 1 more than how a dword ended that was handed over
  uint8_t status, executable, privileged, is_global, CXL_io, untranslated_only;
  uint16_t padding;
};

struct PageRequest {  // as PAGE_REQUEST in sim/compiled_iommu.py
  uint64_t page;
  uint32_t device;
  int32_t process;
  uint16_t group;
  uint8_t privileged, execute, reads, writes, is_last, padding;
};

struct GroupResponse {  // as GROUP_RESPONSE in sim/compiled_iommu.py
  uint32_t device;
  int32_t process;
  uint16_t group, code;
};

struct Message {  // as MESSAGE in sim/compiled_iommu.py
  uint64_t payload;
  int32_t process, segment;
  uint16_t RID;
  uint8_t code, itag;
  uint32_t padding;
};

struct Completion {
  Message of;
  uint64_t due;
  unsigned left, count;  // parts of it
};

struct Store {  // as STORE in sim/compiled_iommu.py
  uint64_t cycle, address;
  uint32_t length, status;
  uint8_t data[BLOCK];
};

struct Update {  // as UPDATE in sim/compiled_iommu.py
  uint64_t cycle, address, compare, swap, found;
};

struct Beat {
  uint64_t data;
  uint32_t cookie;
  uint8_t keep, first, last, status;
};

struct Read {
  uint64_t address;
  uint32_t length, cookie;
  bool is_update;
  uint64_t compare, swap;
  std::vector<Beat> beats;  // empty: memory is looked at when they are given
};

class Iommu : public Run {
 public:
  Iommu(const Options &options, uint8_t *memory, const uint8_t *marks)
      : options(options), random(options.seed), top(&context), memory(memory), marks(marks) {
    for (unsigned n = 0; n < COOKIES - 1; n++) free_cookies.push_back(n);  // the last is that of debug requests
    top.translate_response_ready = top.bus_response_ready = top.ats_message_ready = 1;
    edge(top);
  }
  ~Iommu() { top.final(); }

  // Let cycles pass, at most until all is answered and at rest; returns how many.
  uint64_t run(uint64_t cycles, bool until_idle) {
    const uint64_t begun = cycle;
    while (cycle - begun < cycles && error.empty() && !(until_idle && idle >= QUIET)) step();
    return cycle - begun;
  }

  // One access of the register bus.
  uint64_t access(uint32_t offset, uint32_t enables, int is_write, uint64_t data) {
    top.bus_request_offset = offset, top.bus_request_byte_enable = enables, top.bus_request_is_write = is_write;
    top.bus_request_data = data, top.bus_request_valid = 1;
    bool asked = false;
    idle = 0;
    for (unsigned n = 0; n < ACCESS_LIMIT && error.empty(); n++) {
      step();
      if (!asked && top.bus_request_ready) {
        asked = true;
        top.bus_request_valid = 0;
      } else if (asked && top.bus_response_valid) {
        if (top.bus_response_error) fail("an access of the register at %#x ended with an error", offset);
        const uint64_t found = top.bus_response_data;
        step();
        return found;
      }
    }
    fail("no answer of the register at %#x", offset);
    return 0;
  }

  void ask(const Request *asked, uint64_t count) {
    requests.insert(requests.end(), asked, asked + count);
    answers.resize(requests.size());
    idle = 0;
  }

  void send(const PageRequest *sent, uint64_t count) {
    page_requests.insert(page_requests.end(), sent, sent + count);
    idle = 0;
  }

  void forget() {
    requests.clear(), answers.clear(), stores.clear(), updates.clear();
    next = 0;
  }

  Options options;
  Counts counts = {};
  std::vector<Request> requests;
  std::vector<Answer> answers;  // one for each request
  std::vector<Store> stores;
  std::vector<Update> updates;  // that found what can be read
  std::vector<GroupResponse> responses;
  std::vector<Message> messages;
  uint64_t next = 0;  // request to be asked next
  unsigned outstanding = 0;

 private:
  // One cycle: what is transferred in it, then the inputs of the next, which the wrapper's registers hold.
  void step() {
    bool moves = next != requests.size() || outstanding || !reads.empty() || !beats.empty() || writing || ended || fencing ||
                 !storing.empty() || !page_requests.empty() || !completions.empty();
    counts.hits += top.hit, counts.misses += top.miss, counts.walks += top.begun, counts.merged += top.merged;
    if (asking && top.translate_request_ready) accepted();
    if (top.translate_response_valid) answered();
    if (top.operands_valid && takes_operands) operand(), moves = true;
    if (handing && top.mrif_writes_ready) handed_over();
    if (top.mrif_done_valid && takes_done) stored();
    if (top.bursts_valid && takes_bursts) burst(), moves = true;
    if (ended && top.write_done_ready) ended = false;
    if (top.write_data_valid && takes_data) written(), moves = true;
    if (answering && top.read_data_ready) beats.pop_front(), answering = false;
    if (top.fence_valid && takes_fence) fencing = true, older = outstanding, fence_end = next, counts.fences++, moves = true;
    if (fenced && top.fenced_ready) fencing = fenced = false;
    if (sending && top.page_request_ready) page_requests.pop_front(), sending = false;
    if (top.group_response_valid && takes_responses) responded(), moves = true;
    if (top.ats_message_valid) messaged(), moves = true;
    if (completing) completed();
    idle = moves ? 0 : idle + 1;
    serve();
    offer();
    edge(top);
  }

  void offer() {
    if (!asking && next != requests.size() && outstanding < options.outstanding && !free_cookies.empty() && !random.chance(options.gaps)) {
      const unsigned at = random.below(uint32_t(free_cookies.size()));
      std::swap(free_cookies[at], free_cookies.back());
      const Request &one = requests[next];
      top.translate_request_cookie = free_cookies.back();
      top.translate_request_page = one.iova >> 12, top.translate_request_offset = one.iova & (PAGE - 1);
      top.translate_request_device_id = one.device;
      top.translate_request_process_id_valid = one.process >= 0, top.translate_request_process_id = one.process >= 0 ? one.process : 0;
      top.translate_request_privileged = one.privileged;
      top.translate_request_is_write = one.access == WRITE || one.writes, top.translate_request_execute = one.access == EXEC;
      top.translate_request_kind = one.kind, top.translate_request_is_CXL = one.is_CXL;
      asking = true;
    }
    top.translate_request_valid = asking;
    handing = handing || (!to_hand.empty() && !random.chance(options.stalls));
    top.mrif_writes_valid = handing;
    if (handing) top.mrif_writes_cookie = to_hand.front(), top.mrif_writes_data = requests[asked_with[to_hand.front()]].data;
    top.mrif_done_ready = takes_done = !random.chance(options.stalls);
    top.bursts_ready = takes_bursts = !random.chance(options.stalls);
    top.operands_ready = takes_operands = !random.chance(options.stalls);
    top.write_data_ready = takes_data = writing && !ended && !random.chance(options.stalls);
    top.fence_ready = takes_fence = !fencing;
    fenced = fenced || (fencing && !older && !random.chance(options.stalls));
    top.fenced_valid = fenced;
    answering = answering || (!beats.empty() && !random.chance(options.stalls));
    top.read_data_valid = answering;
    if (answering) {
      const Beat &beat = beats.front();
      top.read_data_data = beat.data, top.read_data_keep = beat.keep, top.read_data_cookie = beat.cookie;
      top.read_data_first = beat.first, top.read_data_last = beat.last, top.read_data_status = beat.status;
    }
    top.write_done_valid = ended;
    offer_messages();
  }

  void offer_messages() {
    if (!sending && !page_requests.empty() && !random.chance(options.gaps)) {
      const PageRequest &one = page_requests.front();
      top.page_request_page = one.page, top.page_request_device_id = one.device;
      top.page_request_process_id_valid = one.process >= 0, top.page_request_process_id = one.process >= 0 ? one.process : 0;
      top.page_request_privileged = one.privileged, top.page_request_execute = one.execute, top.page_request_group = one.group;
      top.page_request_reads = one.reads, top.page_request_writes = one.writes, top.page_request_is_last = one.is_last;
      sending = true;
    }
    top.page_request_valid = sending;
    top.group_response_ready = takes_responses = !random.chance(options.stalls);
    completing = !completions.empty() && completions.front().due <= cycle;
    top.invalidation_completion_valid = completing;
    if (completing) {
      const Completion &one = completions.front();
      top.invalidation_completion_RID = one.of.RID, top.invalidation_completion_itags = 1u << one.of.itag;
      top.invalidation_completion_DSV = one.of.segment >= 0, top.invalidation_completion_DSEG = one.of.segment >= 0 ? one.of.segment : 0;
      top.invalidation_completion_count = one.count & 7;
    }
  }

  void responded() {
    responses.push_back(GroupResponse{top.group_response_device_id, top.group_response_process_id_valid ?
        int32_t(top.group_response_process_id) : -1, uint16_t(top.group_response_group), uint16_t(top.group_response_code)});
  }

  void messaged() {
    messages.push_back(Message{top.ats_message_payload, top.ats_message_PV ? int32_t(top.ats_message_PID) : -1,
        top.ats_message_DSV ? int32_t(top.ats_message_DSEG) : -1, uint16_t(top.ats_message_RID), uint8_t(top.ats_message_code),
        uint8_t(top.ats_message_itag), 0});
    if (top.ats_message_code != INVALIDATION) return;
    const unsigned count = 1 + random.below(8);
    completions.push_back(Completion{messages.back(), cycle + 1 + random.below(uint32_t(options.latency + options.jitter) + 1), count, count});
  }

  void completed() {
    if (!--completions.front().left) completions.pop_front();
  }

  void accepted() {
    const unsigned cookie = free_cookies.back();
    free_cookies.pop_back();
    asked_with[cookie] = next;
    is_asked[cookie] = true;
    answers[next] = Answer{};
    answers[next++].asked = cycle;
    outstanding++;
    asking = false;
  }

  void answered() {
    const unsigned cookie = top.translate_response_cookie;
    if (!is_asked[cookie]) return fail("an answer with cookie %u, which nobody waits for", cookie);
    is_asked[cookie] = false;
    Answer &answer = answers[asked_with[cookie]];
    answer.page = top.translate_response_page, answer.cause = top.translate_response_cause, answer.fault = top.translate_response_fault;
    answer.readable = top.translate_response_readable, answer.writable = top.translate_response_writable;
    answer.size_log2 = top.translate_response_size_log2, answer.PBMT = top.translate_response_PBMT;
    answer.status = top.translate_response_status, answer.executable = top.translate_response_executable;
    answer.privileged = top.translate_response_privileged, answer.is_global = top.translate_response_is_global;
    answer.CXL_io = top.translate_response_CXL_io, answer.untranslated_only = top.translate_response_untranslated_only;
    if (top.translate_response_kind != requests[asked_with[cookie]].kind) return fail("an answer of another kind to cookie %u", cookie);
    answer.answered = cycle;
    const Request &one = requests[asked_with[cookie]];
    if (!answer.fault && answer.size_log2 == MRIF_LOG2 && one.access == WRITE && one.iova % 4 == 0)
      to_hand.push_back(cookie);
    else
      over(cookie);
  }

  // The transfer of a request is over.
  void over(unsigned cookie) {
    free_cookies.insert(free_cookies.begin() + (asking ? free_cookies.size() - 1 : free_cookies.size()), cookie);
    outstanding--;
    if (fencing && older && asked_with[cookie] < fence_end) older--;
  }

  void handed_over() {
    const unsigned cookie = to_hand.front();
    storing.emplace_back(cookie, asked_with[cookie]);
    to_hand.pop_front();
    handing = false;
    over(cookie);
  }

  void stored() {
    if (storing.empty() || storing.front().first != top.mrif_done_cookie)
      return fail("a message ended with cookie %u, which is not the oldest", unsigned(top.mrif_done_cookie));
    answers[storing.front().second].stored = 1 + top.mrif_done_status;
    storing.pop_front();
  }

  // The worst mark of what an access touches: outside memory nothing is there.
  Status status_of(uint64_t address, uint64_t length) const {
    if (address < options.base || length > options.size || address - options.base > options.size - length) return UR;
    Status found = OK;
    for (uint64_t at = (address - options.base) / 8; at <= (address - options.base + length - 1) / 8; at++) {
      if (marks[at] == UR) return UR;
      if (marks[at]) found = Status(marks[at]);
    }
    return found;
  }

  void burst() {
    const uint64_t address = top.bursts_address, length = top.bursts_length_bytes;
    if (!length || length > BLOCK || address / BLOCK != (address + length - 1) / BLOCK || address % 4 || length % 4)
      return fail("a burst of %llu bytes at %#llx", (unsigned long long)length, (unsigned long long)address);
    if (!top.bursts_is_wall) return fail("a burst of the IOMMU is not of the wall");
    if (!top.bursts_is_write) {
      const uint64_t wait = options.latency + (options.jitter ? random.below(uint32_t(options.jitter) + 1) : 0);
      Read read{address, uint32_t(length), uint32_t(top.bursts_cookie), false, 0, 0, {}};
      if (top.bursts_atomic != NONE) {
        if (top.bursts_atomic != CAS || length != 8 || address % 8 || operands.size() < 2)
          return fail("AtomicOp %u of %llu bytes at %#llx with %zu operands", top.bursts_atomic, (unsigned long long)length,
                      (unsigned long long)address, operands.size());
        read.is_update = true, read.compare = operands[0], read.swap = operands[1];
        operands.erase(operands.begin(), operands.begin() + 2);
        counts.updates++;
      } else {
        counts.reads++;
      }
      if (random.below(2)) look(read);
      reads.emplace(std::make_pair(cycle + wait, order++), read);
    } else if (writing) {
      fail("a write before the end of another");
    } else {
      store = Store{0, address, uint32_t(length), OK, {}};
      cookie_of_write = top.bursts_cookie;
      writing = true;
      come = 0;
    }
  }

  void operand() {
    const bool is_second = operands.size() % 2;
    if (top.operands_first == is_second || top.operands_last != is_second || top.operands_keep != 0xFF)
      return fail("first %d, last %d, keep %#x of operand %d", top.operands_first, top.operands_last, top.operands_keep, is_second);
    operands.push_back(top.operands_data);
  }

  void written() {
    const unsigned low = (store.address + come) % 8;
    unsigned count = 8 - low;
    if (count > store.length - come) count = store.length - come;
    const bool is_last = come + count == store.length;
    if (top.write_data_keep != ((1u << count) - 1) << low || top.write_data_last != is_last || top.write_data_first != (come == 0))
      return fail("keep %#x, first %d, last %d at byte %u of a write", top.write_data_keep, top.write_data_first, top.write_data_last, come);
    const uint64_t data = uint64_t(top.write_data_data) >> 8 * low;
    memcpy(store.data + come, &data, count);
    come += count;
    if (!is_last) return;
    store.cycle = cycle;
    store.status = status_of(store.address, store.length);
    if (store.status == POISONED) store.status = OK;  // poison stays, and hinders reads alone
    if (store.status == OK) memcpy(memory + (store.address - options.base), store.data, store.length);
    stores.push_back(store);
    counts.writes++;
    writing = false;
    top.write_done_cookie = cookie_of_write, top.write_done_status = store.status;
    ended = true;
  }

  // Read memory as it is now, or update it.
  void look(Read &read) {
    const Status status = status_of(read.address, read.length);
    if (status != OK) {
      counts.refused_reads++;
      read.beats.push_back(Beat{0, read.cookie, 0, 1, 1, uint8_t(status)});
      return;
    }
    for (uint32_t at = 0; at < read.length;) {
      const unsigned low = (read.address + at) % 8;
      const uint32_t count = 8 - low < read.length - at ? 8 - low : read.length - at;
      uint64_t data = 0;
      memcpy(reinterpret_cast<uint8_t *>(&data) + low, memory + (read.address - options.base) + at, count);
      read.beats.push_back(Beat{data, read.cookie, uint8_t(((1u << count) - 1) << low), at == 0, at + count == read.length, OK});
      at += count;
    }
    if (!read.is_update) return;
    const uint64_t found = read.beats.front().data;
    if (found == read.compare) memcpy(memory + (read.address - options.base), &read.swap, 8);
    updates.push_back(Update{cycle, read.address, read.compare, read.swap, found});
  }

  void serve() {
    while (!reads.empty() && reads.begin()->first.first <= cycle) {
      Read &read = reads.begin()->second;
      if (read.beats.empty()) look(read);
      beats.insert(beats.end(), read.beats.begin(), read.beats.end());
      reads.erase(reads.begin());
    }
  }

  Random random;
  VerilatedContext context;
  Viommu top;
  uint8_t *memory;
  const uint8_t *marks;  // a status for each 8 bytes
  std::vector<unsigned> free_cookies;  // the last is the one that is being asked with
  uint64_t asked_with[COOKIES] = {};
  bool is_asked[COOKIES] = {};
  std::map<std::pair<uint64_t, uint64_t>, Read> reads;  // by (cycle in which it is served, order)
  std::deque<Beat> beats;
  std::deque<unsigned> to_hand;  // cookies of what is to be handed over
  std::deque<std::pair<unsigned, uint64_t>> storing;  // cookie and number of what was handed over
  std::deque<PageRequest> page_requests;
  std::deque<Completion> completions;
  Store store;
  uint64_t order = 0, older = 0, fence_end = 0;
  std::deque<uint64_t> operands;  // of bursts that are to come
  unsigned come = 0, cookie_of_write = 0, idle = 0;
  bool asking = false, takes_bursts = false, takes_operands = false, takes_data = false, takes_fence = false, takes_done = false;
  bool answering = false, handing = false, writing = false, ended = false, fencing = false, fenced = false;
  bool sending = false, completing = false, takes_responses = false;
};

}  // namespace

extern "C" {

Iommu *iommu_open(const Options *options, uint8_t *memory, const uint8_t *marks) { return new Iommu(*options, memory, marks); }
void iommu_close(Iommu *iommu) { delete iommu; }
Options *iommu_options(Iommu *iommu) { return &iommu->options; }
Counts *iommu_counts(Iommu *iommu) { return &iommu->counts; }
uint64_t iommu_cycle(Iommu *iommu) { return iommu->cycle; }
const char *iommu_error(Iommu *iommu) { return iommu->error.empty() ? nullptr : iommu->error.c_str(); }
uint64_t iommu_run(Iommu *iommu, uint64_t cycles, int until_idle) { return iommu->run(cycles, until_idle); }
uint64_t iommu_access(Iommu *iommu, uint32_t offset, uint32_t enables, int is_write, uint64_t data) {
  return iommu->access(offset, enables, is_write, data);
}
void iommu_ask(Iommu *iommu, const Request *requests, uint64_t count) { iommu->ask(requests, count); }
uint64_t iommu_left(Iommu *iommu) { return iommu->requests.size() - iommu->next + iommu->outstanding; }
uint64_t iommu_answers(Iommu *iommu, const Answer **answers) { return *answers = iommu->answers.data(), iommu->answers.size(); }
uint64_t iommu_stores(Iommu *iommu, const Store **stores) { return *stores = iommu->stores.data(), iommu->stores.size(); }
uint64_t iommu_updates(Iommu *iommu, const Update **updates) { return *updates = iommu->updates.data(), iommu->updates.size(); }
void iommu_send(Iommu *iommu, const PageRequest *sent, uint64_t count) { iommu->send(sent, count); }
uint64_t iommu_responses(Iommu *iommu, const GroupResponse **responses) { return *responses = iommu->responses.data(), iommu->responses.size(); }
uint64_t iommu_messages(Iommu *iommu, const Message **messages) { return *messages = iommu->messages.data(), iommu->messages.size(); }
void iommu_forget(Iommu *iommu) { iommu->forget(); }
void iommu_forget_sent(Iommu *iommu) { iommu->responses.clear(), iommu->messages.clear(); }

}  // extern "C"

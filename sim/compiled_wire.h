// The wire of a compiled card whose network function has one: beats of frames, to and from whoever has the socket's other end.
//
// Nothing is lost: while the other end takes nothing, neither does this one.

#pragma once

#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <deque>
#include <vector>

template <unsigned WORDS>  // of a beat
class Wire {
 public:
  int socket = -1;  // of messages, each of whole beats

  // Give what was sent to the other end, take what it sent; returns whether that was something.
  bool exchange() {
    if (socket < 0) return false;
    if (!sent.empty() && (send(socket, sent.data(), 4 * sent.size(), MSG_DONTWAIT | MSG_NOSIGNAL) >= 0 || errno != EAGAIN)) sent.clear();
    uint32_t words[WORDS * MESSAGE];
    ssize_t size;
    while (come.size() < MOST && (size = recv(socket, words, sizeof words, MSG_DONTWAIT)) > 0) {
      for (size_t n = 0; n + WORDS <= size_t(size) / 4; n += WORDS) {
        come.emplace_back();
        std::copy(words + n, words + n + WORDS, come.back().begin());
      }
    }
    return !come.empty();
  }

  // One cycle, as the step of the card: what is transferred in it, then the inputs of the next. Returns whether something is under way.
  template <class Top>
  bool step(Top &top) {
    if (offering && top.wire_i_ready) come.pop_front();
    if (taking && top.wire_o_valid) sent.insert(sent.end(), &top.wire_o_payload[0], &top.wire_o_payload[0] + WORDS);
    offering = !come.empty();
    taking = sent.size() < WORDS * MESSAGE;
    top.wire_i_valid = offering;
    top.wire_o_ready = taking;
    if (offering) std::copy(come.front().begin(), come.front().end(), &top.wire_i_payload[0]);
    return offering || top.wire_o_valid || !sent.empty();
  }

 private:
  enum { MESSAGE = 1024, MOST = 4 * MESSAGE };  // beats
  std::deque<std::array<uint32_t, WORDS>> come;
  std::vector<uint32_t> sent;
  bool offering = false, taking = false;
};

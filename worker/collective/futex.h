// Waiting on a 32-bit word that another thread or process changes: a spin where every waiter
// can have a core of its own, then futex(2). The ordering of data comes from the atomic operations
// alone. Thread-safe; words may lie in memory shared between processes.
#pragma once

#include <atomic>
#include <cstdint>

#include "absl/time/time.h"

namespace lockstep::collective {

// Sleeps while *word == expected, until woken or the deadline; may wake for no reason. False when
// the deadline has passed. `shared`: waiters and wakers may be different processes.
bool FutexWait(std::atomic<uint32_t>& word, uint32_t expected, absl::Time deadline, bool shared);
void FutexWakeAll(std::atomic<uint32_t>& word, bool shared);

// Rounds of Pause worth spending before sleeping when `threads` of one machine wait for each other,
// or none where threads outnumber the cores this process may use. Tenths of a millisecond (a
// Pause takes 40 to 140 cycles): to sleep and be woken costs tens of microseconds on a virtual
// machine, in which the other thread comes to the next wait and sleeps too, so that one short
// interruption would cost several waits.
int SpinRounds(int threads);

inline void Pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

}  // namespace lockstep::collective

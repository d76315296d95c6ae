// Names of threads, as top and perf show them.
#pragma once

#include <pthread.h>

#include <string>

namespace lockstep {

// Of the calling thread; cut after 15 characters.
inline void NameThread(const std::string& name) {
  pthread_setname_np(pthread_self(), name.substr(0, 15).c_str());
}

inline std::string ThreadName() {
  char name[16] = {};
  pthread_getname_np(pthread_self(), name, sizeof(name));
  return name;
}

}  // namespace lockstep

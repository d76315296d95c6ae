// Makes NPY files, whole or wrong, for tests. Thread-safe: pure functions.
#pragma once

#include <cstdint>
#include <string>

namespace lockstep::data {

// As numpy.save writes it: padded so that the data begin at a multiple of 64.
inline std::string NpyHeader(const std::string& type, const std::string& shape,
                             const std::string& order = "False", int version = 1) {
  std::string text =
      "{'descr': '" + type + "', 'fortran_order': " + order + ", 'shape': " + shape + ", }";
  const size_t prefix = version == 1 ? 10 : 12;
  while ((prefix + text.size() + 1) % 64 != 0) text += ' ';
  text += '\n';
  std::string bytes = "\x93NUMPY";
  bytes += static_cast<char>(version);
  bytes += '\0';
  for (size_t i = 0; i < prefix - 8; ++i) bytes += static_cast<char>(text.size() >> (8 * i));
  return bytes + text;
}

template <class T>
std::string Raw(const T* values, size_t count) {
  return std::string(reinterpret_cast<const char*>(values), count * sizeof(T));
}

}  // namespace lockstep::data

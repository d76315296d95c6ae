#include "tests/gpu/emulator/report.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <vector>

namespace lockstep::emulator {
namespace {

// Of the function that begins at `offset` from where the program or module `path` was loaded, by
// its table of symbols: kernels have internal linkage, so that the dynamic linker does not know
// them.
std::string SymbolAt(const char* path, uint64_t offset) {
  std::ifstream in(path, std::ios::binary);
  const std::vector<char> file((std::istreambuf_iterator<char>(in)),
                               std::istreambuf_iterator<char>());
  const auto read = [&file](uint64_t at, auto* to) {
    if (at > file.size() || file.size() - at < sizeof(*to)) return false;
    std::memcpy(to, file.data() + at, sizeof(*to));
    return true;
  };
  Elf64_Ehdr header;
  if (!read(0, &header) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) return "";
  for (unsigned i = 0; i < header.e_shnum; ++i) {
    Elf64_Shdr symbols, strings;
    if (!read(header.e_shoff + i * sizeof(symbols), &symbols)) return "";
    if (symbols.sh_type != SHT_SYMTAB) continue;
    if (!read(header.e_shoff + symbols.sh_link * sizeof(strings), &strings)) return "";
    for (uint64_t s = 0; s < symbols.sh_size / sizeof(Elf64_Sym); ++s) {
      Elf64_Sym symbol;
      if (!read(symbols.sh_offset + s * sizeof(symbol), &symbol)) return "";
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_value != offset) continue;
      const uint64_t name = strings.sh_offset + symbol.st_name;
      if (name >= file.size()) return "";
      return std::string(file.data() + name, strnlen(file.data() + name, file.size() - name));
    }
  }
  return "";
}

}  // namespace

void Fatal(const std::string& message) {
  std::fprintf(stderr, "CUDA emulator: %s\n", message.c_str());
  std::fflush(nullptr);
  std::abort();
}

std::string FunctionName(const void* address) {
  std::string name;
  Dl_info info = {};
  if (dladdr(address, &info) != 0) {
    if (info.dli_sname != nullptr && info.dli_saddr == address) {
      name = info.dli_sname;
    } else {
      const char* const path = info.dli_fname;
      name = SymbolAt(path, static_cast<uint64_t>(static_cast<const char*>(address) -
                                                  static_cast<const char*>(info.dli_fbase)));
      // A program at a fixed address has absolute symbols.
      if (name.empty()) name = SymbolAt(path, reinterpret_cast<uint64_t>(address));
    }
  }
  if (name.empty()) {
    char text[32];
    std::snprintf(text, sizeof(text), "%p", address);
    return text;
  }
  int status = 0;
  char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (demangled != nullptr) name = demangled;
  std::free(demangled);
  return name;
}

}  // namespace lockstep::emulator

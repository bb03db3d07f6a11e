// Cubins are ELF files of 64 bits (System V ABI, "Object Files"). Their section .nv.info holds a list of attributes;
// `cuobjdump -elf` prints it, with the names that are used here.
#include "cubin.hpp"

#include <elf.h>

#include <algorithm>
#include <cstring>

#include "failure.hpp"

namespace soft {
namespace {

constexpr char kMark[] = "SOFTPTX";  // with its NUL between a cubin and its PTX; patches.py writes it

template <class Value>
Value read_as(const char* from) {
  Value value;
  memcpy(&value, from, sizeof value);
  return value;
}

Elf64_Shdr section(const char* image, uint64_t index) {
  const Elf64_Ehdr header = read_as<Elf64_Ehdr>(image);
  return read_as<Elf64_Shdr>(image + header.e_shoff + index * header.e_shentsize);
}

// Of its headers and of its sections.
uint64_t elf_end(const char* image) {
  const Elf64_Ehdr header = read_as<Elf64_Ehdr>(image);
  uint64_t end = std::max(header.e_phoff + uint64_t{header.e_phentsize} * header.e_phnum,
                          header.e_shoff + uint64_t{header.e_shentsize} * header.e_shnum);
  for (uint64_t i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr one = section(image, i);
    if (one.sh_type != SHT_NOBITS) end = std::max(end, one.sh_offset + one.sh_size);
  }
  return end;
}

std::string symbol_name(const char* image, const Elf64_Shdr& symbols, uint32_t number) {
  const Elf64_Sym symbol = read_as<Elf64_Sym>(image + symbols.sh_offset + number * sizeof(Elf64_Sym));
  return image + section(image, symbols.sh_link).sh_offset + symbol.st_name;
}

}  // namespace

bool is_cubin(const char* image) { return memcmp(image, ELFMAG, SELFMAG) == 0; }

const char* find_ptx(const char* image) {
  if (!is_cubin(image)) return image;
  for (const char *at = image + elf_end(image), *last = at + 16; at < last; ++at) {
    if (memcmp(at, kMark, sizeof kMark) == 0) return at + sizeof kMark;
  }
  fail(cudaErrorNoKernelImageForDevice,
       "a cubin without PTX behind it: it was compiled or cached before the software device was installed");
}

std::map<std::string, uint32_t> registers_of(const char* cubin) {
  constexpr uint32_t kInfo = 0x70000000;                // SHT_CUDA_INFO
  constexpr uint8_t kSized = 4, kRegisterCount = 0x2f;  // EIFMT_SVAL, EIATTR_REGCOUNT
  std::map<std::string, uint32_t> result;
  const Elf64_Ehdr header = read_as<Elf64_Ehdr>(cubin);
  for (uint64_t i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr info = section(cubin, i);
    if (info.sh_type != kInfo) continue;
    const Elf64_Shdr symbols = section(cubin, info.sh_link);
    const char *at = cubin + info.sh_offset, *const end = at + info.sh_size;
    while (at + 4 <= end) {
      const uint8_t format = read_as<uint8_t>(at), attribute = read_as<uint8_t>(at + 1);
      const uint16_t size = format == kSized ? read_as<uint16_t>(at + 2) : 0;
      if (format == kSized && attribute == kRegisterCount) {  // a symbol, and its number
        result[symbol_name(cubin, symbols, read_as<uint32_t>(at + 4))] = read_as<uint32_t>(at + 8);
      }
      at += 4 + size;
    }
  }
  return result;
}

}  // namespace soft

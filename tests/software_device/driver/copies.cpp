// Copies and fills. CUDA Runtime API, "API synchronization behavior": what is pageable, pinned or of the device decides
// whether the host waits, and when its own bytes are read.
#include "copies.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "memory.hpp"

namespace soft {
namespace {

constexpr int kPageable = -1;

void check_operand(const char* name, const char* what, const void* address, size_t bytes) {
  const std::string wrong = check_range(address, bytes, what);
  // What a stream allocates or frees may change until the copy runs, and is checked again there.
  if (!wrong.empty() && wrong.find("order of the streams") == std::string::npos) {
    fail(cudaErrorInvalidValue, std::string(name) + ": " + wrong);
  }
}

// Zeros in a large part of the device's memory take no memory of the host: whole pages of it go back to the system,
// which gives pages of zeros where they are touched again.
void fill(void* to, int value, size_t bytes) {
  constexpr size_t kLarge = 64u << 20;
  char *begin = bytes_at(to), *const end = begin + bytes;
  if ((value & 0xFF) == 0 && bytes >= kLarge && kind_of(to) == kDeviceMemory) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t before = (page - reinterpret_cast<uintptr_t>(begin) % page) % page;
    const size_t whole = (bytes - before) / page * page;
    memset(begin, 0, before);
    if (madvise(begin + before, whole, MADV_DONTNEED) == 0) begin += before + whole;
  }
  memset(begin, value, static_cast<size_t>(end - begin));
}

}  // namespace

void enqueue_copy(const char* name, void* to, const void* from, size_t bytes, Stream& stream, bool host_waits) {
  check_operand(name, "the destination", to, bytes);
  check_operand(name, "the source", from, bytes);
  const int to_kind = kind_of(to), from_kind = kind_of(from);
  if (host_waits) refuse_synchronisation(name);
  std::shared_ptr<std::vector<char>> staged;
  if (from_kind == kPageable && to_kind == kDeviceMemory && !stream.capture) {  // read before the call returns
    const char* const bytes_here = static_cast<const char*>(from);
    staged = std::make_shared<std::vector<char>>(bytes_here, bytes_here + bytes);
  }
  const std::string what = name;
  const OperationPtr operation = enqueue(stream, what, [=]() -> std::string {
    std::string wrong = check_range(to, bytes, "the destination");
    if (wrong.empty() && !staged) wrong = check_range(from, bytes, "the source");
    if (!wrong.empty()) return what + ": " + wrong;
    if (!bytes) return {};
    memmove(bytes_at(to), staged ? staged->data() : bytes_at(from), bytes);
    note_copy(to, from, bytes);
    return {};
  });
  // Between two places on the device nobody waits; into pageable memory the hardware waits even if asked not to.
  const bool on_device = to_kind == kDeviceMemory && from_kind == kDeviceMemory;
  const bool into_pageable = to_kind == kPageable && from_kind == kDeviceMemory;
  if (operation && !on_device && (host_waits || into_pageable)) wait_for({operation});
}

void enqueue_fill(const char* name, void* to, int value, size_t bytes, Stream& stream) {
  check_operand(name, "the destination", to, bytes);
  const std::string what = name;
  enqueue(stream, what, [=]() -> std::string {
    const std::string wrong = check_range(to, bytes, "the destination");
    if (!wrong.empty()) return what + ": " + wrong;
    if (!bytes) return {};
    fill(to, value, bytes);
    note_write(to, bytes);
    return {};
  });
}

}  // namespace soft

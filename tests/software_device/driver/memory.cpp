// Allocations. One that is freed stays mapped without access, so that its later use is an error that says so: the
// hardware hands the same address to somebody else, and the use goes unnoticed.
#include "memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "failure.hpp"
#include "settings.hpp"

namespace soft {
namespace {

constexpr size_t kKept = 4096;           // freed allocations that are remembered: a process may map 65 530
constexpr size_t kPoisoned = 64u << 20;  // more than this stays zero: writing it would cost the memory

constexpr uint64_t kNear = 4096;  // bytes past an allocation that a message still names

std::deque<uint64_t> freed;  // oldest first
size_t used;

using Guard = std::lock_guard<std::recursive_mutex>;

std::string hex(uint64_t address) {
  char text[32];
  snprintf(text, sizeof text, "%#llx", static_cast<unsigned long long>(address));
  return text;
}

// The one with the greatest base up to this address.
const Region* below(const std::map<uint64_t, Region>& regions, uint64_t address) {
  auto after = regions.upper_bound(address);
  return after == regions.begin() ? nullptr : &std::prev(after)->second;
}

}  // namespace

Memory& memory() {
  static Memory* const instance = new Memory;  // outlives every other object of the process
  return *instance;
}

std::string Memory::explain(uint64_t address, uint64_t size) const {
  if (const Region* region = find(address)) {
    const uint64_t rest = region->base + region->size - address;
    if (size <= rest) return "inside its allocation";
    return std::to_string(size - rest) + " bytes beyond the end of an allocation of " + std::to_string(region->size) +
           " bytes";
  }
  const Region* const gone = below(dead, address);
  if (gone && address - gone->base < gone->size) {
    return "in an allocation of " + std::to_string(gone->size) +
           " bytes that has been freed, or that comes later in the order of the streams";
  }
  const Region* const last = below(regions, address);
  if (last && address - last->base - last->size < kNear) {
    return "in no allocation, " + std::to_string(address - last->base - last->size) + " bytes past the end of one of " +
           std::to_string(last->size) + " bytes";
  }
  return "in no allocation";
}

void* allocate(size_t bytes, RegionKind kind, bool later) {
  Guard guard(memory().lock);
  if (bytes == 0) return nullptr;
  if (kind == kDeviceMemory && (bytes > total_memory() || used > total_memory() - bytes)) {
    fail(cudaErrorMemoryAllocation, "out of memory: " + std::to_string(bytes) + " bytes asked for, " +
                                        std::to_string(used) + " of " + std::to_string(total_memory()) + " in use");
  }
  const int protection = later ? PROT_NONE : PROT_READ | PROT_WRITE;
  void* const bytes_here = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (bytes_here == MAP_FAILED) fail(cudaErrorMemoryAllocation, "mmap fails for " + std::to_string(bytes) + " bytes");
  const uint64_t base = reinterpret_cast<uint64_t>(bytes_here) + (kind == kDeviceMemory ? kOffset : 0);
  memory().dead[base] = Region{base, bytes, kind, this_thread().device};
  if (kind == kDeviceMemory) used += bytes;
  if (!later) begin_life(base);
  return reinterpret_cast<void*>(base);
}

void begin_life(uint64_t base) {
  Guard guard(memory().lock);
  auto found = memory().dead.find(base);
  if (found == memory().dead.end()) return;
  Region region = found->second;
  memory().dead.erase(found);
  mprotect(host(base), region.size, PROT_READ | PROT_WRITE);
  if (region.kind == kDeviceMemory) {
    region.written = std::make_shared<WrittenBytes>(region.size);
    // NaN in every format, for the host that looks at what nobody has written.
    if (region.size <= kPoisoned) memset(host(base), 0xFF, region.size);
  }
  memory().regions[base] = region;
}

void end_life(uint64_t base) {
  Guard guard(memory().lock);
  auto found = memory().regions.find(base);
  if (found == memory().regions.end()) return;
  mprotect(host(base), found->second.size, PROT_NONE);
  memory().dead[base] = found->second;
  memory().regions.erase(found);
}

void release(uint64_t base) {
  Guard guard(memory().lock);
  auto found = memory().regions.find(base);
  if (found == memory().regions.end()) {
    fail(cudaErrorInvalidValue,
         hex(base) + " cannot be freed: it is " + memory().explain(base, 1) + ", and not the start of a live one");
  }
  const Region region = found->second;
  if (region.kind == kDeviceMemory) used -= region.size;
  memory().regions.erase(found);
  // The pages go back to the system, the addresses stay ours.
  mmap(host(base), region.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  memory().dead[base] = region;
  freed.push_back(base);
  if (freed.size() > kKept) {
    auto oldest = memory().dead.find(freed.front());
    munmap(host(oldest->first), oldest->second.size);
    memory().dead.erase(oldest);
    freed.pop_front();
  }
}

size_t used_memory() { return used; }

int kind_of(const void* address) {
  Guard guard(memory().lock);
  const Region* region = memory().find(reinterpret_cast<uint64_t>(address));
  return region ? region->kind : reinterpret_cast<uint64_t>(address) >= kOffset ? kDeviceMemory : -1;
}

std::string check_range(const void* pointer, size_t bytes, const char* what) {
  Guard guard(memory().lock);
  const uint64_t address = reinterpret_cast<uint64_t>(pointer);
  const Region* region = memory().find(address);
  if (bytes == 0 || (region && bytes <= region->base + region->size - address)) return {};
  const std::string why = memory().explain(address, bytes);
  if (!region && address < kOffset && why.rfind("in no allocation", 0) == 0) return {};  // memory of the process
  return std::string(what) + " of " + std::to_string(bytes) + " bytes at " + hex(address) + " is " + why;
}

char* bytes_at(const void* address) { return host(reinterpret_cast<uint64_t>(address)); }

void note_write(const void* to, size_t bytes) {
  Guard guard(memory().lock);
  const uint64_t address = reinterpret_cast<uint64_t>(to);
  if (const Region* region = memory().find(address)) region->note_write(address, bytes);
}

void note_copy(const void* to, const void* from, size_t bytes) {
  Guard guard(memory().lock);
  const uint64_t target = reinterpret_cast<uint64_t>(to), source = reinterpret_cast<uint64_t>(from);
  const Region *into = memory().find(target), *out_of = memory().find(source);
  if (!out_of || out_of->has_value(source, bytes)) return note_write(to, bytes);
  if (!into || into->kind != kDeviceMemory) return;
  std::vector<uint64_t> state;  // of all first: the two may overlap
  for (uint64_t at = 0; at < bytes; at += 64) {
    state.push_back(out_of->written->get(source - out_of->base + at, std::min<uint64_t>(64, bytes - at)));
  }
  if (!into->written) {
    into->written = std::make_shared<WrittenBytes>(into->size);
    into->written->write(0, into->size);
  }
  for (uint64_t at = 0; at < bytes; at += 64) {
    into->written->put(target - into->base + at, std::min<uint64_t>(64, bytes - at), state[at / 64]);
  }
  if (into->written->missing() == 0) into->written.reset();
}

}  // namespace soft

// Global memory: bounds, permissions, alignment, poison, and conflicts between the threads of a launch.
#include <cstdio>

#include "state.hpp"

namespace emu {

bool is_acquired(const Thread& thread, uint32_t block, uint32_t arrival);
bool is_released(uint32_t block, uint32_t arrival);

namespace {

constexpr uint32_t kAtomicWriter = UINT32_MAX;
constexpr uint32_t kBulkWriter = 1u << 31;  // added to the number of a thread that writes through the async proxy

// Number of a thread in the launch; 0 is nobody.
uint32_t launch_index(const Thread& thread) {
  return static_cast<uint32_t>((machine.first_block + thread.block->rank) * machine.block_threads + thread.index + 1);
}

// "thread 3 of block 7", of a writer.
struct WriterName {
  explicit WriterName(uint32_t writer) {
    const uint32_t index = (writer & ~kBulkWriter) - 1;
    if (writer == kAtomicWriter) {
      snprintf(text, sizeof text, "an atomic update");
      return;
    }
    snprintf(text, sizeof text, "thread %u of block %u", index % machine.block_threads, index / machine.block_threads);
  }
  char text[64];
};

[[noreturn]] void fault_outside(const Thread& thread, uint64_t address, int size, const char* verb, Site site) {
  const Region* nearest = nullptr;
  int64_t distance = 0;
  for (uint64_t i = 0; i < machine.launch.num_regions; ++i) {
    const Region& region = machine.launch.regions[i];
    const int64_t past = static_cast<int64_t>(address - region.address - region.size) + 1;
    const int64_t d = address < region.address ? static_cast<int64_t>(address - region.address) : past > 0 ? past : 1;
    if (!nearest || (d < 0 ? -d : d) < (distance < 0 ? -distance : distance)) nearest = &region, distance = d;
  }
  if (address == 0) fault(thread, site, "%d bytes %s through a null pointer", size, verb);
  if (!nearest) fault(thread, site, "%d bytes %s out of bounds: the launch has no buffers", size, verb);
  if (distance < 0) {
    fault(thread, site, "%d bytes %s out of bounds: %lld bytes before %s", size, verb,
          static_cast<long long>(-distance), nearest->label);
  }
  fault(thread, site, "%d bytes %s out of bounds: %lld bytes past the start of %s, which has %llu bytes", size, verb,
        static_cast<long long>(address - nearest->address), nearest->label,
        static_cast<unsigned long long>(nearest->size));
}

// The region that holds the access; checks bounds, alignment and permission.
const Region& find(const Thread& thread, uint64_t address, int size, int alignment, uint8_t needed, const char* verb,
                   Site site) {
  static uint64_t last = 0;
  const Region* region = nullptr;
  for (uint64_t i = 0, n = machine.launch.num_regions; i < n && !region; ++i) {
    const uint64_t candidate = (last + i) % n;  // `last` may be of an earlier launch
    const Region& r = machine.launch.regions[candidate];
    if (address >= r.address && address - r.address + size <= r.size) region = &r, last = candidate;
  }
  if (address % alignment != 0)
    fault(thread, site, "%d bytes %s misaligned: address 0x%llx", size, verb, static_cast<unsigned long long>(address));
  if (!region) {
    last = 0;
    fault_outside(thread, address, size, verb, site);
  }
  const uint64_t offset = address - region->address;
  const uint8_t uniform = static_cast<uint8_t>(region->uniform_access);
  if (region->access ? needed == 0 && !memchr(region->access + offset, 0, size)
                     : uniform != 0 && (uniform & needed) == needed) {
    return *region;
  }
  for (int i = 0; i < size; ++i) {
    const uint8_t access = region->access ? region->access[offset + i] : region->uniform_access;
    if (access != 0 && (access & needed) == needed) continue;
    if (access == 0) {
      fault(thread, site, "%d bytes %s out of bounds: byte %llu of %s belongs to no element of the view", size, verb,
            static_cast<unsigned long long>(offset + i), region->label);
    }
    if (needed & kWrite) {
      fault(thread, site, "%d bytes %s, but %s is read-only", size, verb, region->label);
    }
  }
  return *region;
}

// A byte that another thread wrote: did that thread's block release it, and has this one acquired it since?
void check_acquired(const Thread& thread, const Region& region, uint64_t byte, uint32_t writer, Site site) {
  const uint64_t index = &region - machine.launch.regions;
  const uint32_t threads = static_cast<uint32_t>(machine.block_threads), index_of = (writer & ~kBulkWriter) - 1;
  const uint32_t block = index_of / threads;
  const uint32_t arrival = machine.writer_arrivals.empty() ? 0 : machine.writer_arrivals[index][byte];
  // No arrival waits for a bulk store, nor for threads that do not call it.
  const bool apart = (writer & kBulkWriter) != 0 || index_of % threads >= static_cast<uint32_t>(machine.arriving);
  if (!apart && is_acquired(thread, block, arrival)) return;
  fault(thread, site, "reads byte %llu of %s, which %s wrote in the same launch and %s",
        static_cast<unsigned long long>(byte), region.label, WriterName(writer).text,
        !apart && is_released(block, arrival) ? "released at no counter where this block was the last"
                                              : "has not released since");
}

// Of the readers of a byte the last one is known, and whether there were any in another cluster.
constexpr uint64_t kOtherClusters = 1ull << 63;

void note_reader(uint64_t& reader, uint32_t stamp) {
  const uint64_t cluster = static_cast<uint64_t>(machine.cluster_number) << 32;
  const bool others = reader != 0 && (reader & ~(kOtherClusters | UINT32_MAX)) != cluster;
  reader = (reader & kOtherClusters) | (others ? kOtherClusters : 0) | cluster | stamp;
}

}  // namespace

void begin_global_memory() {
  const uint64_t count = machine.launch.num_regions;
  machine.writers.assign(count, {});
  machine.readers.assign(count, {});
  machine.writer_arrivals.clear();
  machine.arrivals.clear();
  machine.arriving = 0;
  for (uint64_t i = 0; i < count; ++i) {
    const Region& region = machine.launch.regions[i];
    uint8_t every = static_cast<uint8_t>(region.uniform_access);
    bool both = every == (kRead | kWrite);
    for (uint64_t b = 0; region.access && b < region.size; ++b) {
      every |= region.access[b];
      both |= region.access[b] == (kRead | kWrite);
    }
    if (every & kWrite) machine.writers[i].assign(region.size, 0);
    if (both || ((every & kWrite) && region.written)) machine.readers[i].assign(region.size, 0);
  }
}

// Where to read; `by_proxy`: through the async proxy, which is ordered with nothing that the thread itself does.
const uint8_t* read_global(Thread& thread, uint64_t address, int size, int alignment, bool by_proxy, Site site) {
  const Region& region = find(thread, address, size, alignment, 0, "read", site);
  const uint64_t offset = address - region.address, index = &region - machine.launch.regions;
  const std::vector<uint32_t>& writers = machine.writers[index];
  std::vector<uint64_t>& readers = machine.readers[index];
  if (writers.empty() && (!region.written || !memchr(region.written + offset, 0, size))) return region.host + offset;
  for (uint64_t b = offset; b < offset + size; ++b) {
    const uint32_t writer = writers.empty() ? 0 : writers[b];
    if (writer != 0) {
      if (!by_proxy && (writer == launch_index(thread) || writer == kAtomicWriter)) continue;
      fault(thread, site, "reads byte %llu of %s, which %s wrote in the same launch",
            static_cast<unsigned long long>(b), region.label, WriterName(writer).text);
    }
    const uint8_t access = region.access ? region.access[b] : region.uniform_access;
    if (!(access & kRead) && !region.written) {
      fault(thread, site, "reads byte %llu of %s, which the kernel only writes and has not yet written",
            static_cast<unsigned long long>(b), region.label);
    }
    if (region.written && !region.written[b]) {
      fault(thread, site, "reads byte %llu of %s, which was never written", static_cast<unsigned long long>(b),
            region.label);
    }
    if (!readers.empty()) note_reader(readers[b], stamp_of(thread));
  }
  return region.host + offset;
}

const uint8_t* read_global(Thread& thread, uint64_t address, int size, int alignment, Site site) {
  return read_global(thread, address, size, alignment, false, site);
}

void global_load(const void* ptr, void* out, int size, Site site) {
  Thread& thread = running();
  const uint64_t address = reinterpret_cast<uint64_t>(ptr);
  memcpy(out, read_global(thread, address, size, size, site), size);
  log_access(thread, AccessSite::kGlobalLoad, place_of(thread, __builtin_frame_address(0)), address, size);
}

void global_load_coherent(const void* ptr, void* out, int size, Site site) {
  Thread& thread = running();
  const uint64_t address = reinterpret_cast<uint64_t>(ptr);
  const Region& region = find(thread, address, size, size, 0, "read", site);
  const uint64_t offset = address - region.address, index = &region - machine.launch.regions;
  const std::vector<uint32_t>& writers = machine.writers[index];
  std::vector<uint64_t>& readers = machine.readers[index];
  if (readers.empty()) readers.assign(region.size, 0);
  for (uint64_t b = offset; b < offset + size; ++b) {
    const uint32_t writer = writers.empty() ? 0 : writers[b];
    if (writer == 0) {
      fault(thread, site, "ld_global_cg of byte %llu of %s, which nothing has written in this launch",
            static_cast<unsigned long long>(b), region.label);
    }
    if (writer != launch_index(thread) && writer != kAtomicWriter) check_acquired(thread, region, b, writer, site);
    note_reader(readers[b], stamp_of(thread));
  }
  memcpy(out, region.host + offset, size);
  log_access(thread, AccessSite::kGlobalLoad, place_of(thread, __builtin_frame_address(0)), address, size);
}

// Where to write.
uint8_t* write_global(Thread& thread, uint64_t address, int size, int alignment, bool by_proxy, Site site) {
  const Region& region = find(thread, address, size, alignment, kWrite, "written", site);
  const uint64_t offset = address - region.address, index = &region - machine.launch.regions;
  std::vector<uint32_t>& writers = machine.writers[index];
  const std::vector<uint64_t>& readers = machine.readers[index];
  const uint32_t me = launch_index(thread) | (by_proxy ? kBulkWriter : 0);
  for (uint64_t b = offset; b < offset + size; ++b) {
    if (writers[b] != 0 && (writers[b] != me || by_proxy)) {
      if (writers[b] == kAtomicWriter) fault(thread, site, "plain write to %s after an atomic one", region.label);
      fault(thread, site, "byte %llu of %s is written twice: first by %s", static_cast<unsigned long long>(b),
            region.label, WriterName(writers[b]).text);
    }
    if (!readers.empty() && readers[b] != 0) {
      const uint32_t cluster = static_cast<uint32_t>(readers[b] >> 32), stamp = static_cast<uint32_t>(readers[b]);
      if (cluster != machine.cluster_number || !ordered(thread, machine.stamps[stamp])) {
        fault(thread, site, "race: writes byte %llu of %s, which another thread reads with no barrier between",
              static_cast<unsigned long long>(b), region.label);
      }
    }
    writers[b] = me;
    if (!machine.writer_arrivals.empty()) machine.writer_arrivals[index][b] = thread.arrivals;
    if (region.written) region.written[b] = 1;
  }
  return region.host + offset;
}

void global_store(void* ptr, const void* value, int size, Site site) {
  Thread& thread = running();
  const uint64_t address = reinterpret_cast<uint64_t>(ptr);
  memcpy(write_global(thread, address, size, size, false, site), value, size);
  log_access(thread, AccessSite::kGlobalStore, place_of(thread, __builtin_frame_address(0)), address, size);
}

void* shared_atomic_target(Thread& thread, void* ptr, int size, Site site);

void* global_atomic_target(Thread& thread, void* ptr, int size, Site site) {
  const uint64_t address = reinterpret_cast<uint64_t>(ptr);
  const Region& region = find(thread, address, size, size, kRead | kWrite, "updated atomically", site);
  const uint64_t offset = address - region.address, index = &region - machine.launch.regions;
  for (uint64_t b = offset; b < offset + size; ++b) {
    uint32_t& writer = machine.writers[index][b];
    if (writer == 0 && region.written && !region.written[b]) {
      fault(thread, site, "atomic update of byte %llu of %s, which was never written",
            static_cast<unsigned long long>(b), region.label);
    }
    if (writer != 0 && writer != kAtomicWriter && writer != launch_index(thread)) {
      fault(thread, site, "atomic update of byte %llu of %s, which another thread wrote in the same launch",
            static_cast<unsigned long long>(b), region.label);
    }
    writer = kAtomicWriter;
    if (region.written) region.written[b] = 1;
  }
  return region.host + offset;
}

void* atomic_target(void* ptr, int size, Site site) {
  Thread& thread = running();
  void* const shared = shared_atomic_target(thread, ptr, size, site);
  return shared ? shared : global_atomic_target(thread, ptr, size, site);
}

}  // namespace emu

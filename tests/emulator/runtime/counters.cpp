// Grouping the lanes' accesses into warp instructions, and counting what each costs.
#include <algorithm>

#include "state.hpp"

namespace emu {

// A place is told by the return addresses from an access up to the kernel: a GPU's compiler inlines every function, so
// that each call of a helper is code of its own. Kernels are compiled with frame pointers, and frames lie the higher on
// a stack the earlier they came.
uint64_t place_of(const Thread& thread, const void* frame) {
  uint64_t place = 0;
  const auto* words = static_cast<const uintptr_t*>(frame);  // the caller's frame, and where it goes on
  for (const uintptr_t* last = nullptr; words > last && words + 2 <= reinterpret_cast<const void*>(thread.stack_top);) {
    place = (place ^ words[1]) * 0x9e3779b97f4a7c15;
    last = words;
    words = reinterpret_cast<const uintptr_t*>(words[0]);
  }
  return place;
}

// Accesses of several lanes are one instruction if they come from the same place in the kernel and it is each lane's
// n-th time there since the last warp-wide sync.
void log_access(Thread& thread, AccessSite::Kind kind, uint64_t place, uint64_t address, int size) {
  Warp& warp = *thread.warp;
  // A thread mostly comes from one place to the next: the search begins behind its last one.
  const uint32_t count = static_cast<uint32_t>(warp.sites.size());
  uint32_t at = thread.next_access, passed = 0;
  for (; passed < count; ++passed, ++at) {
    if (at >= count) at = 0;
    const AccessSite& candidate = warp.sites[at];
    if (candidate.place == place && candidate.size == size && candidate.kind == kind) break;
  }
  if (passed == count) {
    at = count;
    warp.sites.push_back({place, kind, static_cast<uint8_t>(size), {}, {}, 0});
  }
  thread.next_access = at + 1;
  AccessSite* const site = &warp.sites[at];
  const uint32_t time = site->times[thread.lane]++;
  if (time >= site->groups.size()) site->groups.resize(time + 1);
  if (time >= site->used) {
    for (uint32_t i = site->used; i <= time; ++i) site->groups[i].lanes = 0;
    site->used = time + 1;
  }
  AccessGroup& group = site->groups[time];
  group.address[thread.lane] = address;
  group.lanes |= 1u << thread.lane;
}

namespace {

int log2_of(int size) { return __builtin_ctz(static_cast<unsigned int>(size)); }

// 32-byte sectors an instruction touches. An aligned access lies in one sector.
uint64_t sectors(const AccessGroup& group) {
  uint64_t sector[32];
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(group.lanes >> lane & 1)) continue;
    const uint64_t s = group.address[lane] / 32;
    if (count == 0 || sector[count - 1] != s) sector[count++] = s;  // neighbours mostly share one
  }
  std::sort(sector, sector + count);
  return static_cast<uint64_t>(std::unique(sector, sector + count) - sector);
}

// Passes over shared memory: 32 banks of 4 bytes, one word per bank and pass; 8 bytes per lane go by half warps,
// 16 by quarters.
void count_wavefronts(const AccessGroup& group, int size) {
  const int lanes_per_pass = size == 16 ? 8 : size == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes_per_pass) {
    uint64_t word[32 * 4];
    int count = 0;
    for (int lane = first; lane < first + lanes_per_pass; ++lane) {
      if (!(group.lanes >> lane & 1)) continue;
      for (int byte = 0; byte < size; byte += 4) word[count++] = (group.address[lane] + byte) / 4;
    }
    if (count == 0) continue;
    std::sort(word, word + count);
    count = static_cast<int>(std::unique(word, word + count) - word);
    int words_in_bank[32] = {}, passes = 0;
    for (int i = 0; i < count; ++i) passes = std::max(passes, ++words_in_bank[word[i] % 32]);
    machine.counters.shared_wavefronts += passes;
    machine.counters.shared_wavefronts_ideal += 1;
  }
}

}  // namespace

void flush_log(Warp& warp) {
  Counters& counters = machine.counters;
  for (AccessSite& site : warp.sites) {
    if (site.used == 0) continue;
    for (uint32_t i = 0; i < site.used; ++i) {
      const AccessGroup& group = site.groups[i];
      const uint64_t bytes = static_cast<uint64_t>(count_lanes(group.lanes)) * site.size;
      if (site.kind == AccessSite::kShared) {
        count_wavefronts(group, site.size);
        continue;
      }
      ++counters.global_requests;
      if (site.kind == AccessSite::kGlobalCopy) {  // the low bits of its addresses say how many bytes are read
        for (int lane = 0; lane < 32; ++lane) {
          if (group.lanes >> lane & 1) counters.global_bytes_read += group.address[lane] % 16 + 1;
        }
        counters.global_sectors_read += sectors(group);
        ++counters.loads_by_size[log2_of(site.size)];
      } else if (site.kind == AccessSite::kGlobalLoad) {
        counters.global_bytes_read += bytes;
        counters.global_sectors_read += sectors(group);
        ++counters.loads_by_size[log2_of(site.size)];
      } else {
        counters.global_bytes_written += bytes;
        counters.global_sectors_written += sectors(group);
        ++counters.stores_by_size[log2_of(site.size)];
      }
    }
    site.used = 0;
    memset(site.times, 0, sizeof site.times);
  }
}

}  // namespace emu

// Who reads shared memory by wgmma. Such a read is in flight until its warp has waited for it; the next write to the
// bytes must come after that wait of each reading warp.
#include <algorithm>
#include <unordered_map>

#include "state.hpp"

namespace emu {

namespace {

// What a wgmma reads for one warp.
struct Reading {
  bool done;     // its warp has waited for it
  Stamp waited;  // of kind kWarp
};

// The last readings of some bytes, by warp of the block.
struct ReadingSet {
  uint32_t readings[32];
};

// Both are numbered; 0 is none.
std::vector<Reading> readings;
std::vector<ReadingSet> sets;
std::unordered_map<uint64_t, uint32_t> unions;  // of a set and a reading
uint64_t last_key;                              // the last one asked for: that of most rows of a tile
uint32_t last_union;
std::vector<std::vector<uint32_t>> sets_of_row;  // the set of each 16 bytes, by block of the cluster

uint32_t unite(uint32_t set, uint32_t reading, int warp) {
  const uint64_t key = uint64_t(set) << 32 | reading;
  if (key == last_key) return last_union;
  uint32_t& result = unions[key];
  if (result == 0) {
    result = static_cast<uint32_t>(sets.size());
    ReadingSet joined = sets[set];
    joined.readings[warp] = reading;
    sets.push_back(joined);
  }
  last_key = key;
  return last_union = result;
}

// One lane that knows its warp to have waited tells of it for all.
bool comes_after(const Thread& thread, const Stamp& waited) {
  if (ordered_by_cluster(thread, waited)) return true;
  if (waited.rank != thread.block->rank) return false;
  if (waited.epoch < thread.block->epoch || waited.thread / 32 == thread.index / 32) return true;
  const uint32_t *known = known_row(thread) + waited.thread, *clock = machine.warp_clocks[waited.object].clock;
  for (int lane = 0; lane < 32; ++lane) {
    if (known[lane] > clock[lane]) return true;
  }
  return false;
}

void check_set(const Thread& thread, const Block& target, const ReadingSet& set, uint32_t offset, Site site) {
  for (int warp = 0; warp < 32; ++warp) {
    if (set.readings[warp] == 0) continue;
    const Reading& reading = readings[set.readings[warp]];
    if (!reading.done) {
      fault(thread, site, "writes shared byte %u, which a wgmma of warp %d of block rank %d reads until its wgmma_wait",
            offset, warp, target.rank);
    }
    if (comes_after(thread, reading.waited)) continue;
    fault(thread, site,
          "race in shared memory: writes byte %u, which a wgmma of warp %d of block rank %d reads, with no barrier "
          "after its wgmma_wait",
          offset, warp, target.rank);
  }
}

}  // namespace

void begin_readings() {
  readings.assign(1, {});
  sets.assign(1, {});
  unions.clear();
  last_key = 0;
  sets_of_row.resize(machine.cluster_blocks);
  for (std::vector<uint32_t>& rows : sets_of_row) rows.assign(machine.launch.dynamic_smem / 16, 0);
}

uint32_t begin_reading() {
  readings.push_back({});
  return static_cast<uint32_t>(readings.size() - 1);
}

void end_reading(uint32_t reading, Warp& warp) { readings[reading] = {true, machine.stamps[stamp_of(warp)]}; }

// Adds a read of the 16 bytes at `offset` by a warp.
void add_reading(const Thread& thread, uint32_t offset, uint32_t reading) {
  uint32_t& set = sets_of_row[thread.block->rank][offset / 16];
  set = unite(set, reading, thread.index / 32);
}

// May `thread` write these bytes of `target`?
void check_readings(Thread& thread, const Block& target, uint32_t offset, uint32_t size, Site site) {
  if (readings.size() == 1) return;
  const std::vector<uint32_t>& rows = sets_of_row[target.rank];
  for (uint32_t row = offset / 16; row < rows.size() && row * 16 < offset + size; ++row) {
    if (rows[row] == thread.checked_readings) continue;
    check_set(thread, target, sets[rows[row]], row * 16, site);
    thread.checked_readings = rows[row];
  }
}

// A bulk load writes these bytes: a thread that waits for it comes after earlier reads, even if its mbarrier does not
// say so.
void forget_readings(const Block& target, uint32_t offset, uint32_t size) {
  if (readings.size() == 1) return;
  const auto rows = sets_of_row[target.rank].begin();
  std::fill(rows + offset / 16, rows + (offset + size) / 16, 0);
}

}  // namespace emu

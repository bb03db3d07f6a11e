// Order between the blocks of a launch: arrivals at counters. PTX ISA, "Memory Consistency Model: Release and acquire
// patterns": what a block wrote before its arrival is known to the block that arrives last, and to whom that releases.
#include <cstdio>

#include "state.hpp"

namespace emu {

void* global_atomic_target(Thread& thread, void* ptr, int size, Site site);

namespace {

uint32_t number_of(const Block& block) { return static_cast<uint32_t>(machine.first_block + block.rank); }

void join(BlockClock& into, const BlockClock& from) {
  for (auto [block, arrivals] : from) {
    uint32_t& known = into[block];
    if (known < arrivals) known = arrivals;
  }
}

bool knows(const BlockClock& clock, uint32_t block, uint32_t arrival) {
  const auto found = clock.find(block);
  return found != clock.end() && found->second > arrival;
}

// Of thread 0, between two barriers of its block: is it the last?
bool arrive(Thread& thread, void* ptr, uint32_t count, Site site) {
  Block& block = *thread.block;
  const uint32_t me = number_of(block);
  if (count == 0) fault(thread, site, "an arrival of 0 at a counter");
  uint32_t* const value = static_cast<uint32_t*>(global_atomic_target(thread, ptr, 4, site));
  ArrivalCounter& counter = machine.arrivals[reinterpret_cast<uint64_t>(ptr)];
  if (counter.open && counter.count != count) {
    fault(thread, site, "an arrival of %u at a counter, but the others there are of %u", count, counter.count);
  }
  if (counter.ended && me != counter.last_block && !knows(block.acquired, counter.last_block, counter.last_arrival)) {
    fault(thread, site, "arrives at a counter where block %u was the last, and does not come after it",
          counter.last_block);
  }
  const uint32_t before = *value;
  *value = before >= count - 1 ? 0 : before + 1;  // atom.inc
  const bool last = before == count - 1;
  counter.value = value;
  counter.site = site;
  counter.count = count;
  counter.open = *value != 0;
  join(counter.released, block.acquired);
  counter.released[me] = thread.arrivals + 1;
  if (last) {
    join(block.acquired, counter.released);
    counter.ended = true;
    counter.last_block = me;
    counter.last_arrival = thread.arrivals;
  }
  return last;
}

}  // namespace

bool arrive_is_last(void* counter, unsigned int count, int id, int threads, Site site) {
  Thread& thread = running();
  check_arch(thread, 700, "arrive_is_last", site);
  const int arriving = id == 0 ? machine.block_threads : threads;
  if (thread.index >= arriving) {
    fault(thread, site, "arrives at a counter, which is for the first %d threads of the block", arriving);
  }
  if (machine.arriving != 0 && machine.arriving != arriving) {
    fault(thread, site, "arrives at a counter with %d threads of the block, but before there were %d", arriving,
          machine.arriving);
  }
  machine.arriving = arriving;
  if (id == 0) {
    block_barrier(Combine::kNone, 0, site);
  } else {
    named_barrier(id, threads, true, site);
  }
  const bool last = thread.index == 0 && arrive(thread, counter, count, site);
  if (thread.index == 0) thread.block->was_last = last;
  ++thread.arrivals;
  if (machine.writer_arrivals.empty()) {
    for (const std::vector<uint32_t>& writers : machine.writers) machine.writer_arrivals.emplace_back(writers.size());
  }
  if (id == 0) return block_barrier(Combine::kOr, last, site) != 0;
  named_barrier(id, threads, true, site);
  return thread.block->was_last;  // no thread arrives again before all have read it: a barrier is between
}

bool is_acquired(const Thread& thread, uint32_t block, uint32_t arrival) {
  return knows(thread.block->acquired, block, arrival);
}

bool is_released(uint32_t block, uint32_t arrival) {
  for (const auto& [address, counter] : machine.arrivals) {
    if (knows(counter.released, block, arrival)) return true;
  }
  return false;
}

// A counter that is not 0 would be wrong for the next launch.
void check_counters_at_end() {
  for (const auto& [address, counter] : machine.arrivals) {
    if (*counter.value == 0) continue;
    char message[160];
    snprintf(message, sizeof message, "the launch leaves a counter at %u, of arrivals of %u: it must end at 0",
             *counter.value, counter.count);
    return record_fault(nullptr, counter.site, message);
  }
}

}  // namespace emu

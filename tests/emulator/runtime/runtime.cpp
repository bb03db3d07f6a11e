// Launch, scheduler, block barriers and warp collectives.
#include "state.hpp"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "fiber.hpp"

namespace emu {

ThreadHead* current;
Dim3 block_dim, grid_dim;
Machine machine;

namespace {

StackPool stack_pool;

uint64_t next_random() {  // splitmix64
  uint64_t z = machine.random += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

template <class T>
void shuffle(T* items, size_t count) {
  for (size_t i = count; i > 1; --i) std::swap(items[i - 1], items[random_below(static_cast<uint32_t>(i))]);
}

}  // namespace

uint64_t random_below(uint32_t bound) { return (next_random() >> 32) * bound >> 32; }  // a division takes longer

// -- errors -------------------------------------------------------------------------------------------

const char* short_name(const char* file) {
  const char* inside = strstr(file, "cuda_src/");
  if (inside) return inside + strlen("cuda_src/");
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

void record_fault(const Thread* thread, Site site, const char* message) {
  std::string text = std::string("kernel ") + machine.launch.name;
  char buffer[256];
  if (thread) {
    const Dim3 block = thread->block_idx;
    snprintf(buffer, sizeof buffer, ", block (%u, %u, %u), thread %d", block.x, block.y, block.z, thread->index);
    text += buffer;
  }
  text += std::string(": ") + message;
  if (site.file) {
    snprintf(buffer, sizeof buffer, ", at %s:%d", short_name(site.file), site.line);
    text += buffer;
  }
  snprintf(machine.launch.error, machine.launch.error_size, "%s", text.c_str());
  machine.failed = true;
}

void fault(const Thread& thread, Site site, const char* format, ...) {
  char message[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  record_fault(&thread, site, message);
  void* abandoned;
  emu_switch(&abandoned, machine.scheduler_stack);
  __builtin_unreachable();
}

void check_arch(const Thread& thread, uint32_t needed, const char* what, Site site) {
  if (machine.launch.arch >= needed) return;
  fault(thread, site, "%s needs sm_%u, but this is sm_%u", what, needed / 10, machine.launch.arch / 10);
}

void check_sm_90a(const Thread& thread, const char* what, Site site) {
  if (machine.launch.arch != kSm90a) {
    fault(thread, site, "%s needs sm_90a, but this is sm_%u", what, machine.launch.arch / 10);
  }
}

void check_sm_80(const char* what, Site site) { check_arch(running(), 800, what, site); }

// -- ordering -----------------------------------------------------------------------------------------

Stamp make_stamp(const Thread& thread, Stamp::Kind kind) {
  return {kind,
          static_cast<uint8_t>(thread.block->rank),
          static_cast<uint16_t>(thread.index),
          thread.block->epoch,
          thread.clock,
          thread.cluster_arrives,
          -1};
}

uint32_t stamp_of(Thread& thread) {
  if (thread.stamp == 0) {
    thread.stamp = static_cast<uint32_t>(machine.stamps.size());
    machine.stamps.push_back(make_stamp(thread, Stamp::kPlain));
  }
  return thread.stamp;
}

uint32_t stamp_of(Warp& warp) {
  Stamp stamp = make_stamp(warp.threads[0], Stamp::kWarp);
  WarpClocks clocks;
  for (int lane = 0; lane < 32; ++lane) {
    const Thread& thread = warp.threads[lane];
    clocks.clock[lane] = thread.clock;
    if (thread.cluster_arrives > stamp.cluster_count) stamp.cluster_count = thread.cluster_arrives;
  }
  if (warp.stamp != 0) {
    const Stamp& last = machine.stamps[warp.stamp];
    if (last.epoch == stamp.epoch && last.cluster_count == stamp.cluster_count &&
        memcmp(&machine.warp_clocks[last.object], &clocks, sizeof clocks) == 0) {
      return warp.stamp;
    }
  }
  stamp.object = static_cast<int>(machine.warp_clocks.size());
  machine.warp_clocks.push_back(clocks);
  warp.stamp = static_cast<uint32_t>(machine.stamps.size());
  machine.stamps.push_back(stamp);
  return warp.stamp;
}

bool ordered_by_cluster(const Thread& thread, const Stamp& earlier) {
  if (earlier.cluster_count >= thread.cluster_waits) return false;  // it has not arrived, or we have not waited for it
  const int first = earlier.rank * machine.block_threads + earlier.thread;
  for (int i = first; i < first + (earlier.kind == Stamp::kWarp ? 32 : 1); ++i) {
    const std::vector<bool>& relaxed = machine.threads[i].relaxed;
    uint32_t released = earlier.cluster_count;
    while (released < thread.cluster_waits && relaxed[released]) ++released;
    if (released == thread.cluster_waits) return false;
  }
  return true;
}

bool ordered(const Thread& thread, const Stamp& earlier) {
  if (ordered_by_cluster(thread, earlier)) return true;
  if (earlier.rank != thread.block->rank) return false;
  if (earlier.epoch < thread.block->epoch) return true;
  if (earlier.kind == Stamp::kWarp) {
    const WarpClocks& clocks = machine.warp_clocks[earlier.object];
    const uint32_t* known = known_row(thread) + earlier.thread;
    for (int lane = 0; lane < 32; ++lane) {
      if (earlier.thread + lane != thread.index && known[lane] <= clocks.clock[lane]) return false;
    }
    return true;
  }
  if (earlier.thread == thread.index) return true;
  return known_row(thread)[earlier.thread] > earlier.clock;
}

void know_into(std::vector<uint32_t>& row, const Thread& thread) {
  const uint32_t* known = known_row(thread);
  row.resize(machine.block_threads);
  for (int i = 0; i < machine.block_threads; ++i) row[i] = row[i] > known[i] ? row[i] : known[i];
  row[thread.index] = thread.clock + 1;
}

void release_into(std::vector<uint32_t>& row, Thread& thread) {
  know_into(row, thread);
  advance(thread);
  thread.block->crosses_warps = true;
}

void acquire_from(const std::vector<uint32_t>& row, Thread& thread) {
  uint32_t* known = known_row(thread);
  for (size_t i = 0; i < row.size(); ++i) known[i] = row[i] > known[i] ? row[i] : known[i];
  advance(thread);
}

// -- scheduling ---------------------------------------------------------------------------------------

namespace {

// Shuffles what was added to `ready` from `begin` on: warps among each other and lanes within their warp; one time in
// four all threads alike.
void shuffle_ready(size_t begin) {
  std::vector<Thread*>& ready = machine.ready;
  if (random_below(4) == 0) {
    shuffle(ready.data() + begin, ready.size() - begin);
    return;
  }
  static std::vector<std::pair<size_t, size_t>> runs;
  static std::vector<Thread*> copy;
  runs.clear();
  for (size_t i = begin, end; i < ready.size(); i = end) {
    for (end = i + 1; end < ready.size() && ready[end]->warp == ready[i]->warp;) ++end;
    shuffle(ready.data() + i, end - i);
    runs.emplace_back(i - begin, end - begin);
  }
  shuffle(runs.data(), runs.size());
  copy.assign(ready.begin() + static_cast<long>(begin), ready.end());
  size_t out = begin;
  for (auto [first, last] : runs) {
    for (size_t i = first; i < last; ++i) ready[out++] = copy[i];
  }
}

}  // namespace

void wait(Thread& thread, Thread::Wait what, int object, Site site) {
  thread.state = Thread::kWaiting;
  thread.wait = what;
  thread.wait_object = object;
  thread.site = site;
  emu_switch(&thread.stack_pointer, machine.scheduler_stack);
}

void wake_all(Thread::Wait what, int object, Thread* first, int count) {
  const size_t begin = machine.ready.size();
  for (Thread* thread = first; thread < first + count; ++thread) {
    if (thread->state != Thread::kWaiting || thread->wait != what || thread->wait_object != object) continue;
    thread->state = Thread::kReady;
    thread->wait = Thread::kNothing;
    machine.ready.push_back(thread);
  }
  shuffle_ready(begin);
}

namespace {

const char* wait_name(Thread::Wait wait) {
  switch (wait) {
    case Thread::kBlockBarrier:
      return "__syncthreads";
    case Thread::kNamedBarrier:
      return "a named barrier";
    case Thread::kWarpCollective:
      return "a warp collective";
    case Thread::kClusterBarrier:
      return "cluster_wait";
    case Thread::kRegisters:
      return "setmaxnreg_inc";
    case Thread::kMBarrier:
      return "mbarrier_wait";
    default:
      return "nothing";
  }
}

// "deadlock: threads 0-31 of block (0, 0, 0) wait in __syncthreads at x.cuh:7; ..."
void record_deadlock() {
  std::string text = "deadlock: ";
  const Thread* culprit = nullptr;
  int groups = 0;
  for (size_t i = 0, end; i < machine.threads.size(); i = end) {
    const Thread& a = machine.threads[i];
    for (end = i + 1; end < machine.threads.size(); ++end) {
      const Thread& b = machine.threads[end];
      if (b.block != a.block || b.state != a.state) break;
      if (a.state == Thread::kWaiting && (a.wait != b.wait || a.site.line != b.site.line)) break;
      if (a.state == Thread::kWaiting && a.wait == Thread::kMBarrier && a.wait_object != b.wait_object) break;
    }
    char buffer[256];
    const Dim3 block = a.block_idx;
    snprintf(buffer, sizeof buffer, "threads %d-%d of block (%u, %u, %u) ", a.index, machine.threads[end - 1].index,
             block.x, block.y, block.z);
    if (++groups > 8) continue;
    if (groups > 1) text += "; ";
    text += buffer;
    if (a.state == Thread::kExited) {
      text += "have exited";
    } else {
      if (!culprit) culprit = &a;
      snprintf(buffer, sizeof buffer, "wait in %s at %s:%d", wait_name(a.wait), short_name(a.site.file), a.site.line);
      text += buffer;
      if (a.wait == Thread::kMBarrier) {
        describe_missing(a.wait_object, buffer, sizeof buffer);
        text += buffer;
      }
    }
  }
  if (groups > 8) text += "; ...";
  record_fault(culprit, {nullptr, 0}, text.c_str());
}

void thread_exit(Thread& thread) {
  Block& block = *thread.block;
  Warp& warp = *thread.warp;
  const Site nowhere = {nullptr, 0};
  if (block.waiting > 0) {
    fault(thread, block.barrier_site, "exited while %d other threads wait in __syncthreads", block.waiting);
  }
  for (int lane = 0; lane < warp.size; ++lane) {
    const Thread& other = warp.threads[lane];
    if (other.state == Thread::kWaiting && other.wait == Thread::kWarpCollective && (other.mask >> thread.lane & 1)) {
      fault(thread, other.site, "exited, but lane %d waits for it in a warp collective", lane);
    }
  }
  if (thread.cluster_arrives != thread.cluster_waits) {
    fault(thread, nowhere, "exited after a cluster_arrive without its cluster_wait");
  }
  if (machine.cluster_max_arrives > thread.cluster_arrives) {
    fault(thread, nowhere, "exited without a cluster_arrive that other threads of its cluster have made");
  }
  check_copies_landed(thread);
  check_warpgroup_exit(thread);
  check_stores_read(thread);
  if (thread.cluster_arrives < machine.cluster_min_exited) machine.cluster_min_exited = thread.cluster_arrives;
  thread.state = Thread::kExited;
  warp.exited |= 1u << thread.lane;
  machine.counters.exps += thread.exp_calls;
  if (++block.exited == machine.block_threads) check_block_exit(thread);
  if (count_lanes(warp.exited) == warp.size) {
    flush_log(warp);
    flush_profile(warp);
  }
}

void fiber_main() {
  machine.launch.kernel(machine.launch.params);
  Thread& thread = running();
  thread_exit(thread);
  emu_switch(&thread.stack_pointer, machine.scheduler_stack);
  __builtin_trap();
}

void begin_thread(Block& block, int index) {
  Thread& thread = block.threads[index];
  const size_t slot = &thread - machine.threads.data();
  thread = Thread{};
  thread.thread_idx = {static_cast<unsigned int>(index), 0, 0};
  thread.block_idx = block.index;
  thread.block = &block;
  thread.warp = &block.warps[index / 32];
  thread.index = index;
  thread.lane = index % 32;
  thread.clock = 1;
  thread.checked_async = -1;
  thread.stack_top = stack_pool.top(slot);
  thread.stack_pointer = prepare_stack(stack_pool.top(slot), fiber_main);
}

void begin_block(int rank, uint64_t linear) {
  Block& block = machine.blocks[rank];
  const int threads = machine.block_threads;
  block.rank = rank;
  const uint64_t x = linear % machine.grid.x, rest = linear / machine.grid.x;
  block.index = {static_cast<unsigned int>(x), static_cast<unsigned int>(rest % machine.grid.y),
                 static_cast<unsigned int>(rest / machine.grid.y)};
  block.threads = machine.threads.data() + static_cast<size_t>(rank) * threads;
  block.warps.resize((threads + 31) / 32);
  block.waiting = block.exited = 0;
  block.epoch = 0;
  const size_t known_size = static_cast<size_t>(threads) * threads;
  if (block.known.size() != known_size || block.crosses_warps) {
    block.known.assign(known_size, 0);
  } else {  // only the entries of a thread's own warp were in use
    for (int i = 0; i < threads; ++i) {
      const int first = i / 32 * 32, count = threads - first < 32 ? threads - first : 32;
      memset(block.known.data() + static_cast<size_t>(i) * threads + first, 0, count * sizeof(uint32_t));
    }
  }
  block.crosses_warps = false;
  block.stores.clear();
  block.acquired.clear();
  for (NamedBarrier& barrier : block.named) barrier = NamedBarrier{};
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.threads = block.threads + 32 * w;
    warp.size = threads - static_cast<int>(32 * w) < 32 ? threads - static_cast<int>(32 * w) : 32;
    warp.exited = warp.met = warp.stamp = 0;
    warp.waiting = 0;
    warp.elected = -1;
    warp.passed.clear();
    warp.meetings.clear();
    warp.waited = false;
    warp.async_passed.clear();
    warp.sites.clear();
  }
  for (int i = 0; i < threads; ++i) begin_thread(block, i);
}

void run_cluster(uint64_t first_block) {
  machine.first_block = first_block;
  ++machine.cluster_number;
  machine.cluster_arrived = machine.cluster_phases = machine.cluster_max_arrives = 0;
  machine.cluster_min_exited = UINT32_MAX;
  machine.stamps.assign(1, Stamp{});
  machine.mbarriers.clear();
  machine.async_phases.clear();
  machine.warp_clocks.clear();
  machine.copies.resize(machine.threads.size());
  for (CopyQueue& queue : machine.copies) queue.copies.clear(), queue.committed = 0;
  for (int rank = 0; rank < machine.cluster_blocks; ++rank) begin_block(rank, first_block + rank);
  begin_async_proxy();
  begin_warpgroups();
  begin_shared_memory();

  machine.ready.clear();
  for (Thread& thread : machine.threads) machine.ready.push_back(&thread);
  shuffle_ready(0);
  // Newest first, so that a warp runs on while it can; one time in sixteen any thread.
  while (!machine.ready.empty()) {
    if (random_below(16) == 0)
      std::swap(machine.ready.back(), machine.ready[random_below(static_cast<uint32_t>(machine.ready.size()))]);
    Thread* thread = machine.ready.back();
    machine.ready.pop_back();
    current = thread;
    emu_switch(&machine.scheduler_stack, thread->stack_pointer);
    if (machine.failed) return;
  }
  for (const Block& block : machine.blocks) {
    if (block.exited < machine.block_threads) return record_deadlock();
  }
}

// A kernel that dereferences a global pointer itself, or runs out of stack, ends in this handler.
void on_segmentation_fault(int, siginfo_t* info, void*) {
  if (stack_pool.in_guard_page(info->si_addr)) {
    fault(running(), {nullptr, 0}, "stack overflow: a thread has %zu KiB", kStackBytes / 1024);
  }
  fault(running(), {nullptr, 0}, "memory accessed other than through <ptx/memory.cuh> (address %p)", info->si_addr);
}

class SegmentationGuard {
 public:
  SegmentationGuard() {
    stack_t alternate = {};
    alternate.ss_sp = stack_;
    alternate.ss_size = sizeof stack_;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_segmentation_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
  }
  ~SegmentationGuard() {
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  char stack_[64 * 1024];
  stack_t old_stack_;
  struct sigaction old_segv_, old_bus_;
};

}  // namespace

// -- block barriers -----------------------------------------------------------------------------------

int block_barrier(Combine op, int value, Site site) {
  Thread& thread = running();
  Block& block = *thread.block;
  if (block.exited > 0) {
    fault(thread, site, "waits in __syncthreads, but %d threads of the block have exited", block.exited);
  }
  if (block.waiting == 0) {
    block.barrier_site = site;
    block.combine = op;
    block.combined = op == Combine::kAnd;
  } else if (!same_place(block.barrier_site, site) || block.combine != op) {
    fault(thread, site, "__syncthreads from two places: other threads of the block wait at %s:%d",
          short_name(block.barrier_site.file), block.barrier_site.line);
  }
  if (op == Combine::kOr) block.combined |= value != 0;
  if (op == Combine::kAnd) block.combined &= value != 0;
  if (op == Combine::kCount) block.combined += value != 0;
  if (++block.waiting < machine.block_threads) {
    wait(thread, Thread::kBlockBarrier, 0, site);
  } else {
    block.waiting = 0;
    ++block.epoch;
    ++machine.counters.barriers;
    for (int i = 0; i < machine.block_threads; ++i) {
      block.threads[i].stamp = block.threads[i].strong_stamp = 0;
      block.threads[i].result = static_cast<uint64_t>(block.combined);
    }
    for (Warp& warp : block.warps) {
      flush_log(warp);
      flush_profile(warp);
    }
    wake_all(Thread::kBlockBarrier, 0, block.threads, machine.block_threads);
  }
  return static_cast<int>(thread.result);
}

void named_barrier(int id, int threads, bool wait_for_others, Site site) {
  Thread& thread = running();
  Block& block = *thread.block;
  if (id < 1 || id > 15) fault(thread, site, "named barrier %d: they are numbered 1 to 15", id);
  if (threads <= 0 || threads % 32 != 0 || threads > machine.block_threads) {
    fault(thread, site,
          "named barrier %d for %d threads: the count must be a multiple of 32 and at most the block's %d", id, threads,
          machine.block_threads);
  }
  NamedBarrier& barrier = block.named[id];
  if (barrier.arrived == 0) barrier.threads = threads;
  if (barrier.threads != threads) {
    fault(thread, site, "named barrier %d for %d threads, but others of the block say %d", id, threads,
          barrier.threads);
  }
  uint32_t& lanes = barrier.lanes_by_warp[thread.index / 32];
  if (lanes >> thread.lane & 1) fault(thread, site, "arrives twice at named barrier %d in one phase", id);
  lanes |= 1u << thread.lane;
  release_into(barrier.release, thread);
  if (++barrier.arrived < threads) {
    if (wait_for_others) {
      wait(thread, Thread::kNamedBarrier, id, site);
    }
    return;
  }
  const uint32_t all = 0xffffffff;
  for (auto [warp, arrived] : barrier.lanes_by_warp) {
    if (arrived != all) fault(thread, site, "named barrier %d: only some lanes of warp %d arrived", id, warp);
  }
  for (int i = 0; i < machine.block_threads; ++i) {
    Thread& other = block.threads[i];
    const bool waits =
        other.state == Thread::kWaiting && other.wait == Thread::kNamedBarrier && other.wait_object == id;
    if (waits || (&other == &thread && wait_for_others)) acquire_from(barrier.release, other);
  }
  barrier = NamedBarrier{};
  wake_all(Thread::kNamedBarrier, id, block.threads, machine.block_threads);
}

// -- warp collectives ---------------------------------------------------------------------------------

namespace {

// The lane that `thread` reads in a shuffle: PTX's shfl.sync pseudo-code, but an explicit lane must be in range.
int source_lane(const Thread& thread) {
  const int width = thread.width, segment = thread.lane & ~(width - 1), argument = thread.lane_arg;
  int source = thread.lane;
  switch (thread.what) {
    case Collective::kShfl:
      if (argument < 0 || argument >= width) {
        fault(thread, thread.site, "__shfl_sync from lane %d of a segment of %d lanes", argument, width);
      }
      return segment + argument;
    case Collective::kShflUp:
      source = thread.lane - argument;
      return source < segment ? thread.lane : source;
    case Collective::kShflDown:
      source = thread.lane + argument;
      return source >= segment + width ? thread.lane : source;
    default:
      source = thread.lane ^ argument;
      return source >= segment + width ? thread.lane : source;
  }
}

uint64_t reduce(Collective what, const Warp& warp, uint32_t mask) {
  bool first = true;
  long long result = 0;
  for (int lane = 0; lane < warp.size; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const long long value = static_cast<long long>(warp.threads[lane].value);
    if (what == Collective::kReduceAdd) {
      result += value;
    } else if (first || (what == Collective::kReduceMax ? value > result : value < result)) {
      result = value;
    }
    first = false;
  }
  return static_cast<uint64_t>(result);
}

// Everything the lanes of `mask` did is ordered before what they do next.
void synchronise_lanes(Warp& warp, uint32_t mask) {
  Block& block = *warp.threads[0].block;
  const int threads = machine.block_threads, base = warp.threads[0].index;
  const int begin = block.crosses_warps ? 0 : base, count = block.crosses_warps ? threads : warp.size;
  static std::vector<uint32_t> joined;
  joined.assign(count, 0);
  const uint32_t everyone = warp.size == 32 ? 0xffffffff : (1u << warp.size) - 1;
  for (int lane = 0; lane < warp.size; ++lane) {
    if (!(mask >> lane & 1)) continue;
    advance(warp.threads[lane]);
    if (mask == everyone && !block.crosses_warps) continue;  // all entries are overwritten below
    const uint32_t* known = known_row(warp.threads[lane]) + begin;
    for (int i = 0; i < count; ++i) joined[i] = joined[i] > known[i] ? joined[i] : known[i];
  }
  for (int lane = 0; lane < warp.size; ++lane) {
    if (mask >> lane & 1) joined[base + lane - begin] = warp.threads[lane].clock;
  }
  for (int lane = 0; lane < warp.size; ++lane) {
    if (mask >> lane & 1) memcpy(known_row(warp.threads[lane]) + begin, joined.data(), count * sizeof(uint32_t));
  }
}

// Where all lanes of a warp meet.
void flush(Warp& warp, uint32_t mask) {
  const uint32_t everyone = warp.size == 32 ? 0xffffffff : (1u << warp.size) - 1;
  if (mask == everyone) flush_log(warp);
  if ((mask | warp.exited) != everyone) return;
  flush_profile(warp);
  if (!warp.waited) return;
  warp.waited = false;
  WarpClocks& met = warp.meetings.emplace_back();
  for (int lane = 0; lane < warp.size; ++lane) met.clock[lane] = warp.threads[lane].clock;
}

void complete_collective(Warp& warp, const Thread& last) {
  const uint32_t mask = last.mask;
  if (last.what >= Collective::kElect) {
    if (last.what == Collective::kElect) {
      if (warp.elected < 0) warp.elected = 1 + static_cast<int>(random_below(31));
    } else if (last.what >= Collective::kWgmma) {
      complete_warpgroup_collective(warp, last.what, last.site);
    } else {
      complete_matrix_collective(warp, last.what, last.site);
    }
    return flush(warp, mask);
  }
  uint64_t shared_result = 0;
  if (last.what == Collective::kBallot) {
    for (int lane = 0; lane < warp.size; ++lane) {
      if (mask >> lane & 1) shared_result |= warp.threads[lane].value << lane;
    }
  } else if (last.what >= Collective::kReduceMax) {
    shared_result = reduce(last.what, warp, mask);
  }
  for (int lane = 0; lane < warp.size; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Thread& thread = warp.threads[lane];
    thread.result = shared_result;
    if (last.what < Collective::kShfl || last.what > Collective::kShflXor) continue;
    const int source = source_lane(thread);
    if (!(mask >> source & 1)) {
      fault(thread, thread.site, "shuffle reads lane %d, which is not in the mask 0x%08x", source, mask);
    }
    thread.result = warp.threads[source].value;
  }
  // Shuffles, votes and reductions order no memory accesses: https://docs.nvidia.com/cuda/cuda-c-programming-guide/
  if (last.what == Collective::kSync) {
    synchronise_lanes(warp, mask);
  } else {
    ++machine.counters.warp_collectives;
  }
  flush(warp, mask);
}

// Faults unless `other`, in the mask of `thread`, has arrived or may yet arrive at the same collective.
bool has_arrived(const Thread& thread, const Thread& other) {
  if (other.state == Thread::kExited) {
    fault(thread, thread.site, "the mask 0x%08x of a warp collective holds lane %d, which has exited", thread.mask,
          other.lane);
  }
  if (other.state != Thread::kWaiting || other.wait != Thread::kWarpCollective) return false;
  if (other.mask == thread.mask) {
    if (other.what != thread.what || !same_place(other.site, thread.site)) {
      fault(thread, thread.site, "lanes of one mask in two warp collectives: lane %d waits at %s:%d", other.lane,
            short_name(other.site.file), other.site.line);
    }
    return true;
  }
  if (other.mask >> thread.lane & 1) {
    fault(thread, thread.site,
          "lanes with different masks in a warp collective: 0x%08x, but lane %d has 0x%08x at %s:%d", thread.mask,
          other.lane, other.mask, short_name(other.site.file), other.site.line);
  }
  return false;  // it may still be released, and come here
}

// Has every lane of the mask arrived? Faults where one never can.
bool all_have_arrived(const Thread& thread, Warp& warp) {
  if (thread.mask == 0xffffffff && warp.exited == 0 && warp.waiting == count_lanes(warp.met)) {
    // Nobody waits but for the whole warp: one of those stands for all.
    const Thread* other = warp.met == 0 ? nullptr : &warp.threads[__builtin_ctz(warp.met)];
    if (!other || has_arrived(thread, *other)) return (warp.met | 1u << thread.lane) == 0xffffffff;
  }
  bool complete = true;
  for (int lane = 0; lane < warp.size; ++lane) {
    if (lane != thread.lane && (thread.mask >> lane & 1) && !has_arrived(thread, warp.threads[lane])) complete = false;
  }
  return complete;
}

}  // namespace

unsigned long long warp_collective(Collective what, unsigned int mask, unsigned long long value, int lane_arg,
                                   int width, Site site) {
  Thread& thread = running();
  Warp& warp = *thread.warp;
  thread.what = what;
  thread.mask = mask;
  thread.value = value;
  thread.lane_arg = lane_arg;
  thread.width = width;
  thread.site = site;
  if (!(mask >> thread.lane & 1)) fault(thread, site, "lane %d is not in its own mask 0x%08x", thread.lane, mask);
  if (warp.size < 32 && mask >> warp.size != 0) {
    fault(thread, site, "the mask 0x%08x holds lanes that do not exist: the warp has %d", mask, warp.size);
  }
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fault(thread, site, "a shuffle's width must be a power of two up to 32, not %d", width);
  }
  if (what > Collective::kShfl && what <= Collective::kShflXor && (lane_arg < 0 || lane_arg > 31)) {
    fault(thread, site, "a shuffle's lane offset must be 0 to 31, not %d", lane_arg);
  }
  if (all_have_arrived(thread, warp)) {
    complete_collective(warp, thread);
    warp.waiting -= count_lanes(mask) - 1;
    if (mask == 0xffffffff) warp.met = 0;
    wake_all(Thread::kWarpCollective, static_cast<int>(mask), warp.threads, warp.size);
  } else {
    ++warp.waiting;
    if (mask == 0xffffffff) warp.met |= 1u << thread.lane;
    wait(thread, Thread::kWarpCollective, static_cast<int>(mask), site);
  }
  return thread.result;
}

bool elect_one(Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "elect_one", site);
  warp_collective(Collective::kElect, 0xffffffff, 0, 0, 32, site);
  return thread.lane == thread.warp->elected;
}

}  // namespace emu

// -- launch -------------------------------------------------------------------------------------------

using emu::machine;

// Runs a grid; 0, or 1 with a message in launch->error.
extern "C" __attribute__((visibility("default"))) int emu_launch(const emu::Launch* launch) {
  machine.launch = *launch;
  machine.grid = {launch->grid[0], launch->grid[1], launch->grid[2]};
  machine.block_threads = static_cast<int>(launch->block);
  machine.cluster_blocks = static_cast<int>(launch->cluster);
  machine.counters = emu::Counters{};
  machine.random = launch->seed;
  machine.failed = false;
  machine.cluster_number = 0;
  machine.threads.resize(machine.total_threads());
  machine.blocks.resize(machine.cluster_blocks);
  emu::grid_dim = machine.grid;
  emu::block_dim = {launch->block, 1, 1};
  machine.smem_arrays.clear();
  machine.static_smem = 0;
  machine.dynamic_alignment = 0;
  emu::begin_global_memory();

  const uint64_t blocks = uint64_t(launch->grid[0]) * launch->grid[1] * launch->grid[2];
  std::vector<uint32_t> order(blocks / launch->cluster);
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<uint32_t>(i);
  emu::shuffle(order.data(), order.size());

  const uint64_t float_mode = emu::keep_subnormals();
  {
    emu::SegmentationGuard guard;
    emu::begin_profile();
    for (size_t i = 0; i < order.size() && !machine.failed; ++i) {
      emu::run_cluster(static_cast<uint64_t>(order[i]) * launch->cluster);
    }
  }
  if (!machine.failed) emu::check_counters_at_end();
  emu::end_profile();
  emu::restore_float_mode(float_mode);
  *launch->counters = machine.counters;
  return machine.failed ? 1 : 0;
}

// The state of one launch: threads, warps, blocks, the cluster that runs now, and what orders their memory accesses.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include <device.hpp>

namespace emu {

// -- what Python passes in and gets back; laid out as in __init__.py ----------------------------------

struct Counters {
  uint64_t global_bytes_read, global_bytes_written, global_sectors_read, global_sectors_written, global_requests;
  uint64_t loads_by_size[5], stores_by_size[5];  // warp instructions of 1, 2, 4, 8 and 16 bytes per lane
  uint64_t shared_wavefronts, shared_wavefronts_ideal;
  uint64_t exps, barriers, warp_collectives, mma, wgmma, ldmatrix, cluster_barriers, mbarrier_waits, st_async_bytes;
  uint64_t bulk_bytes;
  uint64_t cost;
};

constexpr uint32_t kSm90a = 901;  // Launch::arch; otherwise 900 is sm_90

enum Access : uint8_t { kRead = 1, kWrite = 2 };

// One allocation on the device: `size` bytes at `address`, kept at `host`.
struct Region {
  uint64_t address, size;
  uint8_t* host;
  const uint8_t* access;  // per byte, what the kernel may do; null: `uniform_access` everywhere
  uint8_t* written;       // per byte, whether it ever got a value; null: all have
  const char* label;
  uint64_t uniform_access;
};

struct Launch {
  const char* name;
  void (*kernel)(const void* params);
  const void* params;
  uint64_t params_size;
  const Region* regions;
  uint64_t num_regions;
  uint32_t grid[3], block, cluster, arch;
  uint64_t dynamic_smem, smem_limit, registers, seed;
  Counters* counters;
  char* error;
  uint64_t error_size;
};

// -- happens-before -----------------------------------------------------------------------------------

// When a thread accessed memory. Stamps of a cluster are numbered; 0 is "never".
struct Stamp {
  enum Kind : uint8_t { kPlain, kStrong, kAsync, kMBarrier, kCopy, kWarp, kBulkRead };
  Kind kind;
  uint8_t rank;            // of the thread's block in the cluster
  uint16_t thread;         // in its block
  uint32_t epoch;          // block barriers completed
  uint32_t clock;          // the thread's own clock
  uint32_t cluster_count;  // cluster_arrives of the thread
  // kStrong: what was accessed; kAsync: the phase that delivers the bytes; kMBarrier: the mbarrier; kWarp: whose
  // WarpClocks, an access by all lanes of a warp, of which `thread` is the first.
  int object;
};

struct WarpClocks {
  uint32_t clock[32];
};

// What is known of one byte of shared memory.
struct ShadowByte {
  uint32_t writer;     // the last plain one; where there was none, a strong one
  uint32_t reader[2];  // plain ones, of two different warps
  uint32_t strong;     // number of its StrongAccesses in the block; 0: none

  bool operator==(const ShadowByte& other) const { return memcmp(this, &other, sizeof other) == 0; }
};

// The atomics and relaxed accesses to a byte since the last plain write, of two different warps each.
struct StrongAccesses {
  uint32_t writer[2], reader[2];
};

// The bytes that st_async or bulk loads send to one phase of an mbarrier.
struct AsyncPhase {
  int mbarrier;
  const char* what;  // sends them
  bool from_others;  // from another block of the cluster
  bool landed;
  std::vector<Stamp> passed;  // threads that waited for the phase
};

struct Flight {
  uint32_t offset;
  uint8_t size;
  uint8_t bytes[16];
};

// A cp.async that has not landed.
struct Copy {
  uint32_t offset;
  uint32_t group;  // groups that its thread committed before
  uint8_t source_bytes;
  uint8_t bytes[16];
  const uint8_t* source;
  Site site;
};

// The copies of one thread, oldest first.
struct CopyQueue {
  std::vector<Copy> copies;
  uint32_t committed;  // groups
};

// A run of elements of a box: where it is in global memory, and in the box before the swizzle.
struct BulkRow {
  uint8_t* global;
  uint32_t offset, size;
};

// A box in shared memory.
struct BulkBox {
  uint32_t offset, size;
  uint32_t swizzle;           // what it permutes 16-byte chunks of, in bytes, or 0
  std::vector<BulkRow> rows;  // those inside of the tensor
  Site site;
};

struct BulkLoad : BulkBox {
  std::vector<uint8_t> bytes;
};

struct BulkStore : BulkBox {
  int thread;
  uint32_t group;  // groups that its thread committed before
};

// A thread's last wait for an mbarrier.
struct Waited {
  int64_t phases = -1;    // that were complete after it; -1: it never waited
  uint32_t clock, epoch;  // of the thread, as in a Stamp
  size_t meeting;         // the next of its warp
  size_t loads;           // bulk loads of the thread before it
};

struct MBarrier {
  int rank;  // of the block it lies in
  uint32_t offset;
  int count, pending;
  int64_t tx;
  uint32_t phase;  // completed phases
  Stamp init;
  bool fenced;
  Stamp fence;
  int async, last_async;  // AsyncPhase of the current and of the last phase, or -1
  std::vector<Flight> flights;
  std::vector<BulkLoad> loads;
  int64_t in_flight;                            // bytes of both
  std::vector<Waited> waited;                   // by thread
  std::vector<uint32_t> release, last_release;  // what a waiter of the current / last phase gets to know
  std::vector<uint32_t> sent, last_sent;        // what threads that sent it bytes knew, which a waiter does not
  uint32_t epoch, last_epoch;                   // block barriers completed before an arrival of that phase
  int waiters;
};

// What is known of the blocks of the launch, by their number: what they wrote before so many of their arrivals.
using BlockClock = std::map<uint32_t, uint32_t>;

// Where blocks arrive, see arrivals.cpp.
struct ArrivalCounter {
  const uint32_t* value;
  uint32_t count;  // of its arrivals, as the last of them said
  bool open;       // some have arrived and more must
  bool ended;      // a last one has arrived, of this block; how many arrivals that had made before
  uint32_t last_block;
  uint32_t last_arrival;
  BlockClock released;
  Site site;
};

// -- threads ------------------------------------------------------------------------------------------

struct Warp;
struct Block;

struct Thread : ThreadHead {
  enum State : uint8_t { kReady, kWaiting, kExited };
  enum Wait : uint8_t {
    kNothing,
    kBlockBarrier,
    kNamedBarrier,
    kWarpCollective,
    kClusterBarrier,
    kRegisters,
    kMBarrier
  };

  void* stack_pointer;
  const char* stack_top;
  Block* block;
  Warp* warp;
  int index, lane;
  State state;
  Wait wait;
  Site site;  // where it waits
  uint32_t clock, cluster_arrives, cluster_waits;
  uint32_t arrivals;          // at counters
  std::vector<bool> relaxed;  // of its cluster_arrives, which were
  uint32_t stamp;             // number of its current stamp; 0: none yet since the last synchronisation
  uint32_t strong_stamp;      // the same for its last strong access
  uint32_t copy_stamp;        // of the bytes that its copies have in flight
  uint32_t bulk_groups;       // of bulk stores, committed
  std::vector<int> loads;     // AsyncPhase of each of its bulk loads
  int checked_async;          // last AsyncPhase whose bytes it may read
  uint32_t next_access;       // where log_access begins to search
  uint32_t checked_readings;  // last set of readings by wgmma whose bytes it may write
  // Operands and result of a warp collective.
  Collective what;
  uint32_t mask;
  int lane_arg, width;
  uint64_t value, result;
  int wait_object;  // the named barrier or the mbarrier it waits for
};

// Accesses of the lanes of a warp that make up one instruction: equal place, equally often executed since the last
// sync.
struct AccessGroup {
  uint32_t lanes;
  uint64_t address[32];
};

struct AccessSite {
  enum Kind : uint8_t { kGlobalLoad, kGlobalStore, kGlobalCopy, kShared };
  uint64_t place;
  Kind kind;
  uint8_t size;
  uint32_t times[32];  // how often each lane was here
  std::vector<AccessGroup> groups;
  uint32_t used;
};

struct Warp {
  Thread* threads;
  int size;
  uint32_t exited;  // lanes
  uint32_t met;     // lanes that wait in a collective of the whole warp
  int waiting;      // lanes that wait in any collective
  int elected;      // the lane of elect_one, or -1
  uint32_t stamp;   // number of the last stamp of kind kWarp
  // By stamp: plain reads by all lanes are known to come after it.
  std::vector<bool> passed;
  std::vector<bool> async_passed;  // the same of reads by the async proxy
  // When all lanes met in a collective, the first time after one had waited for an mbarrier.
  std::vector<WarpClocks> meetings;
  bool waited;  // a lane has since the last of them
  std::vector<AccessSite> sites;
  // Since all lanes last met, with a profiled kernel only: how often each lane ran each basic block, and the
  // blocks that any lane ran.
  std::vector<uint32_t> block_counts, blocks_run;
};

struct NamedBarrier {
  int threads, arrived;
  std::map<int, uint32_t> lanes_by_warp;
  std::vector<uint32_t> release;
};

struct Block {
  int rank;
  Dim3 index;
  Thread* threads;
  std::vector<Warp> warps;
  int waiting, exited;  // threads in the block barrier, threads gone
  uint32_t epoch;
  Combine combine;
  int combined;
  Site barrier_site;
  NamedBarrier named[16];
  // known[i * threads + j]: thread i comes after what thread j did while its clock was below this. Entries of other
  // warps are in use only once `crosses_warps`.
  std::vector<uint32_t> known;
  bool crosses_warps;
  std::vector<uint8_t> arena;  // dynamic shared memory, then the static arrays
  std::vector<ShadowByte> shadow;
  std::vector<StrongAccesses> strong;
  std::vector<BulkStore> stores;  // that may not have read their boxes
  BlockClock acquired;            // from other blocks
  bool was_last;                  // at its last counter
  uint8_t* arena_start;
};

struct SmemArray {
  const void* key;
  uint32_t offset, size;
};

// The launch that runs now. One at a time: the emulator is single-threaded.
struct Machine {
  Launch launch;
  Dim3 grid;
  int block_threads, cluster_blocks;
  Counters counters;
  std::vector<Thread> threads;  // of the cluster
  std::vector<Block> blocks;
  std::vector<Stamp> stamps;
  std::vector<MBarrier> mbarriers;
  std::vector<AsyncPhase> async_phases;
  std::vector<WarpClocks> warp_clocks;
  std::vector<CopyQueue> copies;                 // of each thread
  std::vector<std::vector<Stamp>> proxy_fences;  // of each thread
  std::vector<Thread*> ready;
  uint64_t first_block;  // linear index of the cluster's first block
  uint32_t cluster_number;
  uint32_t cluster_arrived, cluster_phases, cluster_max_arrives, cluster_min_exited;
  std::vector<SmemArray> smem_arrays;
  uint32_t smem_top;
  uint64_t static_smem;
  int dynamic_alignment;  // of dynamic shared memory, as the kernel asks for it; 0: it has not
  uint64_t random;
  void* scheduler_stack;
  bool failed;
  // Global memory: who wrote and who read each byte of a writable region, see global_memory.cpp.
  std::vector<std::vector<uint32_t>> writers;
  std::vector<std::vector<uint64_t>> readers;
  // How many arrivals the writer's block had made; empty before the first of the launch.
  std::vector<std::vector<uint32_t>> writer_arrivals;
  std::map<uint64_t, ArrivalCounter> arrivals;  // by address
  int arriving;                                 // threads of a block that arrive there; 0: none yet

  int total_threads() const { return block_threads * cluster_blocks; }
};

extern Machine machine;

inline int count_lanes(uint32_t mask) {  // without the instruction, __builtin_popcount is a call
  mask -= mask >> 1 & 0x55555555;
  mask = (mask & 0x33333333) + (mask >> 2 & 0x33333333);
  return static_cast<int>(((mask + (mask >> 4)) & 0x0f0f0f0f) * 0x01010101 >> 24);
}

inline bool same_place(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

inline Thread& running() { return *static_cast<Thread*>(current); }

// -- errors -------------------------------------------------------------------------------------------

// Ends the launch: records the message with kernel, block, thread and call site, and leaves the fiber for good.
[[noreturn]] void fault(const Thread& thread, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));
// The same from the scheduler, which has no thread of its own to name.
void record_fault(const Thread* thread, Site site, const char* message);
void check_arch(const Thread& thread, uint32_t needed, const char* what, Site site);
void check_sm_90a(const Thread& thread, const char* what, Site site);
const char* short_name(const char* file);

// -- scheduling ---------------------------------------------------------------------------------------

uint64_t random_below(uint32_t bound);
void wait(Thread& thread, Thread::Wait what, int object, Site site);     // returns when woken
void wake_all(Thread::Wait what, int object, Thread* first, int count);  // those of a range that wait so, shuffled

// -- ordering -----------------------------------------------------------------------------------------

bool ordered(const Thread& thread, const Stamp& earlier);             // does `thread` come after `earlier`?
bool ordered_by_cluster(const Thread& thread, const Stamp& earlier);  // the same, because of a cluster barrier
// May the async proxy, on behalf of `thread`, touch what `earlier` accessed?
bool async_ordered(const Thread& thread, const Stamp& earlier);
uint32_t stamp_of(Thread& thread);  // number of its current stamp
uint32_t stamp_of(Warp& warp);      // the same for what all its lanes do together
Stamp make_stamp(const Thread& thread, Stamp::Kind kind);
inline void advance(Thread& thread) { ++thread.clock, thread.stamp = thread.strong_stamp = 0; }
inline uint32_t* known_row(const Thread& thread) {
  return thread.block->known.data() + static_cast<size_t>(thread.index) * machine.block_threads;
}
void release_into(std::vector<uint32_t>& row, Thread& thread);  // what `thread` did so far, and knows
void acquire_from(const std::vector<uint32_t>& row, Thread& thread);
void know_into(std::vector<uint32_t>& row, const Thread& thread);  // the same as release_into, of no effect on `thread`

// -- counting -----------------------------------------------------------------------------------------

uint64_t place_of(const Thread& thread, const void* frame);  // of an access, by the frame of what the kernel called
void log_access(Thread& thread, AccessSite::Kind kind, uint64_t place, uint64_t address, int size);
void flush_log(Warp& warp);
void begin_profile();
void end_profile();
void flush_profile(Warp& warp);  // where all lanes of a warp meet

// -- parts --------------------------------------------------------------------------------------------

void begin_async_proxy();      // at the start of a cluster
void begin_warpgroups();       // at the start of a cluster
void begin_shared_memory();    // at the start of a cluster
void check_counters_at_end();  // of a launch
void begin_global_memory();    // at the start of a launch
uint32_t smem_offset(Thread& thread, const void* ptr, int size, Site site);
void check_copies_landed(const Thread& thread);
void check_stores_read(const Thread& thread);
void complete_matrix_collective(Warp& warp, Collective what, Site site);
void multiply(const Warp& warp, Collective what);
void complete_warpgroup_collective(Warp& warp, Collective what, Site site);
void check_warpgroup_exit(const Thread& thread);
void check_block_exit(Thread& last);  // nothing may be in flight to a block that leaves
void settle_mbarrier(MBarrier& bar);  // completes its phase if a thread waits for it and it can
void describe_missing(int mbarrier, char* text, size_t size);
void land(const BulkLoad& load, Block& block);

}  // namespace emu

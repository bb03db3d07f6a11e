// A launch: its clusters one after another in a shuffled order, each with shared memory that holds nothing.
#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "execution/counters.hpp"
#include "execution/grid_order.hpp"
#include "memory/shadow.hpp"

namespace soft {

Stats& stats() {
  static Stats total;
  return total;
}

namespace {

constexpr u32 kAllLanes = 0xffffffff;

u64 seed = getenv("SOFTWARE_DEVICE_SEED") ? strtoull(getenv("SOFTWARE_DEVICE_SEED"), nullptr, 0) : 0;

u32 round_up(u32 n, u32 unit) { return (n + unit - 1) / unit * unit; }

// In the order of the decoder's names of special registers.
enum Special {
  kTid,
  kNtid = 3,
  kCtaid = 6,
  kNctaid = 9,
  kLaneid = 12,
  kWarpid,
  kLanemaskEq,
  kLanemaskLt,
  kLanemaskLe,
  kLanemaskGt,
  kLanemaskGe,
  kSmid,
  kNsmid,
  kDynamicSmemSize,
  kTotalSmemSize,
  kClusterCtarank,
  kClusterNctarank,
  kNwarpid,
  kWarpSize
};

template <class Value>
void set_special(Warp& warp, int which, Value value) {
  if (!warp.f->special_used[which]) return;
  u32* const lanes = R<u32>(warp, warp.f->special[which]);
  for (u32 lane = 0; lane < 32; ++lane) lanes[lane] = value(lane);
}

void set_constant(Warp& warp, int which, u32 value) {
  set_special(warp, which, [value](u32) { return value; });
}

// What all blocks of the launch see alike.
void set_specials_of_launch(Warp& warp, const Launch& launch, u32 cluster_size) {
  const u32 first = warp.index * 32, x = launch.block[0], y = launch.block[1];
  set_special(warp, kTid, [=](u32 lane) { return (first + lane) % x; });
  set_special(warp, kTid + 1, [=](u32 lane) { return (first + lane) / x % y; });
  set_special(warp, kTid + 2, [=](u32 lane) { return (first + lane) / (x * y); });
  for (int d = 0; d < 3; ++d) {
    set_constant(warp, kNtid + d, launch.block[d]);
    set_constant(warp, kNctaid + d, launch.grid[d]);
  }
  set_special(warp, kLaneid, [](u32 lane) { return lane; });
  set_constant(warp, kWarpid, warp.index);
  set_special(warp, kLanemaskEq, [](u32 lane) { return 1u << lane; });
  set_special(warp, kLanemaskLt, [](u32 lane) { return (1u << lane) - 1; });
  set_special(warp, kLanemaskLe, [](u32 lane) { return (2u << lane) - 1; });
  set_special(warp, kLanemaskGt, [](u32 lane) { return ~((2u << lane) - 1); });
  set_special(warp, kLanemaskGe, [](u32 lane) { return ~((1u << lane) - 1); });
  set_constant(warp, kSmid, 0);
  set_constant(warp, kNsmid, 132);
  set_constant(warp, kDynamicSmemSize, launch.smem);
  set_constant(warp, kTotalSmemSize, static_cast<u32>(warp.block->smem.size()));
  set_constant(warp, kClusterCtarank, warp.block->rank);
  set_constant(warp, kClusterNctarank, cluster_size);
  set_constant(warp, kNwarpid, static_cast<u32>(warp.block->warps.size()));
  set_constant(warp, kWarpSize, 32);
}

class Grid {
 public:
  Grid(Function& function, const Launch& launch)
      : function_(function),
        launch_(launch),
        size_(function.attributes.cluster),
        blocks_(size_),
        params_(launch.params) {
    threads_ = launch.block[0] * launch.block[1] * launch.block[2];
    warps_ = (threads_ + 31) / 32;
    params_.resize(params_.size() + 16);
    state_.warps = std::vector<WarpState>(size_ * warps_);
    state_.blocks = std::vector<BlockState>(size_);
    cluster_.state = &state_;
    if (function.orders_blocks && !is_lenient(function)) state_.grid = std::make_shared<GridOrder>();
    for (u32 rank = 0; rank < size_; ++rank) make_block(rank);
    random_ = seed ^ (u64(launch.grid[0]) << 32 | threads_);
  }

  void run() {
    const u64 x = launch_.grid[0] / size_, y = launch_.grid[1], count = x * y * launch_.grid[2];
    // A step that has no factor in common with the count visits every cluster once.
    u64 step = count == 1 ? 1 : next_random(random_) % count, at = next_random(random_) % count;
    while (greatest_common_divisor(step, count) != 1) ++step;
    for (u64 i = 0; i < count; ++i, at = (at + step) % count) {
      begin_cluster(static_cast<u32>(at % x), static_cast<u32>(at / x % y), static_cast<u32>(at / (x * y)));
      run_cluster(cluster_, random_);
    }
  }

 private:
  static u64 greatest_common_divisor(u64 a, u64 b) { return b == 0 ? a : greatest_common_divisor(b, a % b); }

  void make_block(u32 rank) {
    Block& block = blocks_[rank];
    cluster_.blocks.push_back(&block);
    block.cl = &cluster_;
    block.rank = rank;
    block.f = &function_;
    block.l = &launch_;
    block.threads = threads_;
    block.state = &state_.blocks[rank];
    block.params = params_.data();
    block.param_size = static_cast<u32>(launch_.params.size());
    block.smem.resize(launch_.smem ? function_.dynamic_begin + launch_.smem : static_end(function_));
    const size_t stride = round_up(function_.regs_bytes, 64) + 64;
    block.regs_store.assign(stride * warps_ + 64, '\xff');
    char* const registers = block.regs_store.data() + (64 - reinterpret_cast<u64>(block.regs_store.data()) % 64);
    block.local_store.resize(size_t(function_.local_bytes) * 32 * warps_);
    block.warps.resize(warps_);
    for (u32 index = 0; index < warps_; ++index) {
      Warp& warp = block.warps[index];
      warp.regs = registers + index * stride;
      warp.block = &block;
      warp.index = index;
      warp.f = &function_;
      warp.local = block.local_store.data() + size_t(index) * 32 * function_.local_bytes;
      warp.state = &state_.warps[rank * warps_ + index];
      warp.state->number = rank * warps_ + index;
      std::copy(function_.constants.begin(), function_.constants.end(), warp.regs + function_.const_begin);
      set_specials_of_launch(warp, launch_, size_);
    }
  }

  void begin_cluster(u32 x, u32 y, u32 z) {
    cluster_.arrived = cluster_.phase = 0;
    cluster_.live = size_ * threads_;
    state_.release.clear();
    state_.last_release.clear();
    for (Block& block : blocks_) {
      block.ctaid[0] = x * size_ + block.rank;
      block.ctaid[1] = y;
      block.ctaid[2] = z;
      block.live_threads = threads_;
      for (Barrier& barrier : block.state->barriers) barrier.arrived = 0;
      block.state->fences.clear();
      std::fill(block.smem.begin(), block.smem.end(), '\xff');  // NaN in every floating-point type
      begin_shadow(block);
      begin_registers(block);
      block.local_written.assign(block.local_store.size(), false);
      for (Warp& warp : block.warps) begin_warp(warp);
    }
    begin_asynchronous(cluster_);
    if (state_.grid) state_.grid->begin_cluster(state_.warps.size());
  }

  void begin_warp(Warp& warp) {
    for (int d = 0; d < 3; ++d) set_constant(warp, kCtaid + d, warp.block->ctaid[d]);
    const u32 lanes = threads_ - warp.index * 32;
    warp.live = lanes >= 32 ? kAllLanes : (1u << lanes) - 1;
    warp.ng = 1;
    warp.g[0] = {0, warp.live, Ready, 0};
    WarpState& state = *warp.state;
    state.cluster_arrived = state.cluster_waited = 0;
    state.known.assign(state_.warps.size(), 0);
    state.known[warp_number(warp)] = 1;
    state.proxy_fences.clear();
    state.lanes_ordered = 0;
    state.pairs.clear();
  }

  Function& function_;
  const Launch& launch_;
  u32 size_, threads_, warps_;
  std::vector<Block> blocks_;
  std::vector<char> params_;
  Cluster cluster_;
  ClusterState state_;
  u64 random_;
};

}  // namespace

std::string launch(Function* function, const Launch& launch) {
  if (!function->error.empty()) return "kernel " + function->name + ": " + function->error;
  if (launch.grid[0] % function->attributes.cluster != 0) {
    return "kernel " + function->name + ": a grid of " + std::to_string(launch.grid[0]) +
           " blocks, which is no multiple of its clusters of " + std::to_string(function->attributes.cluster);
  }
  const auto begin = std::chrono::steady_clock::now();
  try {
    begin_counting(*function);
    Grid(*function, launch).run();
    end_counting(*function);
  } catch (const std::exception& error) {
    return error.what();
  }
  const Counters& total = counters();
  stats().warp_instructions = total.warp_instructions;
  stats().lane_instructions = total.lane_instructions;
  stats().seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return "";
}

}  // namespace soft

extern "C" __attribute__((visibility("default"))) void softSeed(uint64_t value) { soft::seed = value; }

// What PTX becomes: instructions with the offsets of their registers, functions and modules; and the warps, blocks and
// clusters that execute them.
#pragma once

#include <array>
#include <cstring>
#include <stdexcept>
#include <string>

#include "alu/numbers.hpp"
#include "device.hpp"

namespace soft {

// Windows of the generic address space: shared and local memory and parameters; all below is global memory. The low
// 32 bits of a generic address are no address in shared memory.
constexpr u64 kShared = (1ull << 50) + (1ull << 30), kLocal = 2 * kShared, kParam = 4 * kShared;

[[noreturn]] inline void die(const std::string& message) { throw std::runtime_error(message); }

struct Warp;
struct Inst;
struct Block;

// -- code ---------------------------------------------------------------------------------------------

// Executes an instruction for the lanes in Warp::mask.
using Handler = void (*)(Warp&, const Inst&);

// How the scheduler of a warp treats an instruction; it knows all but Normal, Collective and Yielding by itself.
enum Kind : u8 {
  Normal,
  Bra,
  Exit,
  BarSync,
  WarpSync,
  Collective,  // lanes of the warp together
  Yielding,    // may poll in vain, and then lets others run
  ClusterWait,
  ClusterArrive,
  BarArrive,
  BarRed,
  TakeRegisters
};

// State spaces (PTX ISA, "State Spaces"); .const lies in global memory.
enum Space : u8 { Generic, Global, Shared, Local, ParamS, Const };

// What an mbarrier orders: nothing, what its block did (the default), or what its cluster did.
enum class Order : u8 { kRelaxed, kBlock, kCluster };

// An instruction. Operands are offsets in the register file of a warp, of constants too; an address is a register (a,
// of `as` bytes; 0: none) plus imm.
struct Inst {
  Handler fn = nullptr;
  Kind kind = Normal;
  bool has_pred = false, pneg = false;    // under a predicate, or where it is false
  u8 rnd = 0;                             // a Rounding
  u8 flag = 0;                            // modifiers, as each handler defines them
  u8 vec = 1;                             // elements of a vector
  u8 size = 0;                            // of one of them, in bytes
  u8 space = 0;                           // a Space
  Order order = Order::kBlock;            // of mbarriers
  u32 pred = 0;                           // the predicate
  u32 d = 0, a = 0, b = 0, c = 0, e = 0;  // registers: destination, sources, and one that differs with the handler
  u8 ds = 0, as = 0;                      // bytes of the registers d and a where they may differ from the type's
  u32 x[8] = {};                          // registers of vectors
  u32 y[8] = {};
  s64 imm = 0;           // a constant, or what is added to an address
  u32 target = 0;        // of a branch: index in Function::code
  u32 line = 0;          // of the source, or of the PTX where it does not say
  u32 text = 0;          // in Function::texts
  u32 extra = 0;         // in Function::lists
  u32 location = 0;      // of the source, in Module::locations
  s64 source_imm = 0;    // of cp.async: what is added to the address in b
  bool aligned = false;  // .aligned: all lanes of the warp execute it together
};

// Where an instruction comes from (PTX ISA, .loc): a line of a file, and the call that the compiler inlined it at.
struct Location {
  u32 file, line, column;
  std::string function;
  u32 inlined_at;
};

// Special registers of 32 bits (PTX ISA, "Special Registers"). Function::special has their offsets in this order; who
// launches a kernel fills them.
constexpr std::array<const char*, 27> kSpecialRegisters = {"%tid.x",
                                                           "%tid.y",
                                                           "%tid.z",
                                                           "%ntid.x",
                                                           "%ntid.y",
                                                           "%ntid.z",
                                                           "%ctaid.x",
                                                           "%ctaid.y",
                                                           "%ctaid.z",
                                                           "%nctaid.x",
                                                           "%nctaid.y",
                                                           "%nctaid.z",
                                                           "%laneid",
                                                           "%warpid",
                                                           "%lanemask_eq",
                                                           "%lanemask_lt",
                                                           "%lanemask_le",
                                                           "%lanemask_gt",
                                                           "%lanemask_ge",
                                                           "%smid",
                                                           "%nsmid",
                                                           "%dynamic_smem_size",
                                                           "%total_smem_size",
                                                           "%cluster_ctarank",
                                                           "%cluster_nctarank",
                                                           "%nwarpid",
                                                           "WARP_SZ"};

struct Function {
  std::string name;
  Module* module;
  std::vector<Inst> code;
  std::vector<Param> params;
  Attributes attributes{0, 0, 1024, 0, 0};
  u32 regs_bytes = 0, const_begin = 0;  // of the register file, and where the constants begin in it
  std::vector<char> constants;
  u32 special[40];  // offsets of the special registers that it uses
  bool special_used[40] = {};
  std::vector<std::string> texts;  // of the instructions
  std::string error;               // why it cannot be launched
  u32 local_bytes = 0;             // of a thread
  u32 dynamic_begin = 0;           // offset of dynamic shared memory
  std::vector<std::vector<u32>> lists;
  std::vector<u32> opcodes;                        // of each instruction, numbers of execution/counters.cpp
  std::vector<std::pair<u32, u32>> shared_arrays;  // static ones: offset, bytes
  u32 shared_end = 0;                              // of the last of them
  bool orders_blocks = false;                      // by an atomic or a fence beyond the block
};

inline u32 static_end(const Function& function) {  // of static shared memory, with its padding
  return (function.shared_end + 15) / 16 * 16;
}

struct Module {
  ~Module();
  std::map<std::string, std::unique_ptr<Function>> functions;
  std::map<std::string, std::pair<u64, size_t>> globals;  // address, bytes
  std::map<int, std::string> files;
  std::vector<Location> locations{1};  // 0: unknown
  std::string target;
  char* storage = nullptr;  // of the globals
  size_t storage_bytes = 0;
};

// The source line of an instruction with the calls that it was inlined through; empty where the PTX has no .loc.
std::string source_line(const Function& function, const Inst& instruction);

// -- what executes it ---------------------------------------------------------------------------------

struct WarpState;  // execution/state.hpp
struct BlockState;
struct ClusterState;

struct Cluster {
  std::vector<Block*> blocks;
  u32 arrived = 0, phase = 0, live = 0;  // of its barrier: threads in this phase, phases that are over; threads left
  u64 changes = 0;                       // events that may let a warp go on
  ClusterState* state = nullptr;
};

// Lanes of a warp with one pc. `wait` is a Wait; `arg` says what for.
struct Group {
  u32 pc, mask;
  u8 wait;
  u32 arg;
};

struct Warp {
  char* regs;
  u32 mask;  // of the instruction that runs now
  Block* block;
  u32 live;  // lanes that have not exited
  Group g[32];
  int ng;
  u32 index;
  char* local;  // memory of lane 0, and then of the others
  const Function* f;
  bool yield = false;  // the instruction polled in vain
  WarpState* state = nullptr;
};

struct Block {
  std::vector<char> smem, regs_store, local_store;
  std::vector<bool> local_written;  // bytes of local_store that have a value
  std::vector<Warp> warps;
  const Function* f;
  const Launch* l;
  u32 ctaid[3];
  u32 threads, live_threads;
  const Region* cached = nullptr;  // the allocation of the last access
  char* params;
  u32 param_size;
  Cluster* cl = nullptr;
  u32 rank = 0;
  BlockState* state = nullptr;
};

Stats& stats();
template <class T>
static inline T* R(Warp& w, u32 off) {
  return (T*)(w.regs + off);
}

// In front of a loop over lanes, none of which needs what another one writes.
#if defined(__clang__)
#define INDEPENDENT_LANES
#else
#define INDEPENDENT_LANES _Pragma("GCC ivdep")
#endif

template <class D, class F>
static inline __attribute__((always_inline)) void each(Warp& w, D* d, F f) {
  if (w.mask == ~0u) {
    INDEPENDENT_LANES
    for (int l = 0; l < 32; l++) d[l] = f(l);
  } else
    for (u32 m = w.mask; m; m &= m - 1) {
      int l = __builtin_ctz(m);
      d[l] = f(l);
    }
}
template <class F>
static inline __attribute__((always_inline)) void lanes(Warp& w, F f) {
  for (u32 m = w.mask; m; m &= m - 1) f(__builtin_ctz(m));
}

}  // namespace soft

// What the two halves of the software device know of each other. The driver (driver/) owns memory, streams and handles
// and decides when a kernel runs; the interpreter loads modules of PTX and runs a kernel when it is told to.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "written_bytes.hpp"

namespace soft {

// -- memory (driver/memory.cpp) ---------------------------------------------------------------------------------------

// A device address is the address of its bytes in this process plus this. No address of a process is that large, on
// x86-64 (47 bits) nor on aarch64 (48), so that a host that dereferences a device pointer ends in a segmentation fault,
// as with a GPU. The interpreter has the windows of shared, local and parameter space above it.
constexpr uint64_t kOffset = 1ull << 49;

enum RegionKind { kDeviceMemory = 0, kPinnedMemory = 1, kManagedMemory = 2 };

// An allocation that is alive; `base` is the address that a kernel uses.
struct Region {
  uint64_t base, size;
  int kind;
  int device = 0;
  bool constant = false;  // no kernel may write it
  // Null: all bytes have a value, as far as is known.
  mutable std::shared_ptr<WrittenBytes> written = nullptr;

  void note_write(uint64_t address, uint64_t bytes) const {
    if (!written) return;
    written->write(address - base, bytes);
    if (written->missing() == 0) written.reset();
  }
  bool has_value(uint64_t address, uint64_t bytes) const { return !written || written->all(address - base, bytes); }
};

// All allocations. Kernels run while the driver's lock is held, so that nothing changes here meanwhile.
class Memory {
 public:
  // The live allocation that holds `address`, or null.
  const Region* find(uint64_t address) const {
    auto after = regions.upper_bound(address);
    if (after == regions.begin()) return nullptr;
    const Region& region = std::prev(after)->second;
    return address - region.base < region.size ? &region : nullptr;
  }

  // Why [address, address + size) is no part of a live allocation, in words that follow "is ".
  std::string explain(uint64_t address, uint64_t size) const;

  std::map<uint64_t, Region> regions;  // alive, by base
  std::map<uint64_t, Region> dead;  // freed, or not allocated yet in the order of the streams: mapped, not accessible
  std::recursive_mutex lock;
};

Memory& memory();

// Where the bytes of a device, pinned or managed address lie in this process.
inline char* host(uint64_t address) {
  return reinterpret_cast<char*>(address >= kOffset ? address - kOffset : address);
}

// -- modules and kernels (the interpreter) ----------------------------------------------------------------------------

struct Module;
struct Function;

// A parameter of a kernel as its .entry declares it.
struct Param {
  uint32_t offset, size, align;
};

// What a kernel needs and allows. `dyn_smem_max` and `large_cluster` are what cuFuncSetAttribute has allowed.
struct Attributes {
  uint32_t static_smem, local, max_threads;
  uint32_t regs;  // per thread, as the cubin says; without one the most that ptxas would take
  uint32_t num_instructions;
  int dyn_smem_max = 48 << 10;
  uint32_t block[3] = {};      // .reqntid: the only size of a block; 0: any
  uint32_t cluster = 1;        // .reqnctapercluster: blocks
  bool large_cluster = false;  // of more than 8 blocks
  bool regs_bounded = false;   // .maxntid, .reqntid or .maxnreg: ptxas knows the registers of a launch
};

struct Launch {
  uint32_t grid[3], block[3];
  uint32_t smem;             // bytes of dynamic shared memory
  std::vector<char> params;  // the parameters at their offsets
};

Module* module_load(const char* ptx, std::string& error);  // null, and why
void module_unload(Module* module);
Function* module_function(Module* module, const char* name);
bool module_global(Module* module, const char* name, uint64_t& address, size_t& size);
const std::vector<Param>& function_params(Function* function);
Attributes& function_attributes(Function* function);
const std::string& module_target(Module* module);  // sm_90a
const std::string& function_name(Function* function);

// Runs a kernel to its end. Returns what is wrong, with kernel, block, thread and instruction, or nothing.
std::string launch(Function* function, const Launch& launch);

// What cuTensorMapEncodeTiled makes of an array, in a layout of our own: NVIDIA's is not documented. It fills the first
// bytes of a CUtensorMap, the rest are zero.
struct TensorMap {
  uint64_t address;
  uint32_t last[5];     // sizes less one
  uint64_t strides[4];  // bytes, of all dimensions but the innermost
  uint16_t box[5];
  uint8_t rank, type, swizzle;  // CUtensorMapDataType, CUtensorMapSwizzle

  uint32_t item() const {  // bytes of an element; 0: no such type
    static constexpr uint8_t kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    return type < sizeof kBytes ? kBytes[type] : 0;
  }
  uint32_t span() const { return swizzle == 0 ? 0 : 16u << swizzle; }  // bytes within which the swizzle permutes
  uint32_t row_bytes() const { return box[0] * item(); }
  uint32_t box_bytes() const {
    uint32_t bytes = row_bytes();
    for (int d = 1; d < rank; ++d) bytes *= box[d];
    return bytes;
  }
};
static_assert(sizeof(TensorMap) <= 128);

struct Stats {
  uint64_t warp_instructions, lane_instructions;
  double seconds;
};
Stats& stats();

// -- settings (driver/settings.cpp) -----------------------------------------------------------------------------------

int compute_capability();               // 80 for sm_80
int multiprocessors();                  // %nsmid
uint64_t random_below(uint64_t bound);  // of the seed that pytest's header prints
void set_seed(uint64_t seed);

}  // namespace soft

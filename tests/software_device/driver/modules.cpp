// Modules, and the checks of a launch. PTX ISA, "Performance-Tuning Directives" (.maxntid); CUDA C++ Programming Guide,
// "Technical Specifications per Compute Capability".
#include "modules.hpp"

#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <set>
#include <sstream>
#include <vector>

#include "cubin.hpp"
#include "settings.hpp"

namespace soft {
namespace {

std::map<LoadedModule*, std::shared_ptr<LoadedModule>> modules;
std::set<Kernel*> kernels;

void need_context() {
  if (!this_thread().has_context) {
    fail(static_cast<cudaError_t>(CUDA_ERROR_INVALID_CONTEXT),
         "the thread has no context: call a function of the runtime that makes one, such as cudaMemGetInfo, first");
  }
}

uint32_t registers_of_thread(const Attributes& attributes) {  // as a warp gets them
  constexpr uint32_t kUnit = 8;
  return (attributes.regs + kUnit - 1) / kUnit * kUnit;
}

// Does code for this target run on the device? PTX ISA, ".target": sm_90a on 9.0 only; a cubin on later devices of its
// major version, PTX on all later ones.
bool runs_here(const std::string& target, bool cubin) {
  const int here = compute_capability(), wanted = atoi(target.c_str() + target.find_first_of("0123456789"));
  if (target.back() == 'a') return here == wanted;
  return here >= wanted && (!cubin || here / 10 == wanted / 10);
}

// The limits of the hardware. Beyond them a launch fails there, with a code and no word about which.
void check_launch(Kernel& kernel, const uint32_t (&grid)[3], const uint32_t (&block)[3], uint32_t dynamic_bytes) {
  constexpr uint32_t kMostBlocks[] = {0x7fffffff, 65535, 65535};
  constexpr uint32_t kMostInBlock[] = {kMostThreads, kMostThreads, 64};
  const Attributes& attributes = function_attributes(kernel.function);
  auto refuse = [&](const std::string& words, cudaError_t code = cudaErrorInvalidValue) {
    fail(code, "launch of kernel " + function_name(kernel.function) + ": " + words);
  };
  for (int axis = 0; axis < 3; ++axis) {
    const std::string name = std::string(1, "xyz"[axis]);
    if (grid[axis] == 0 || grid[axis] > kMostBlocks[axis]) {
      refuse("gridDim." + name + " is " + std::to_string(grid[axis]) + ", but must be 1 to " +
             std::to_string(kMostBlocks[axis]));
    }
    if (block[axis] == 0 || block[axis] > kMostInBlock[axis]) {
      refuse("blockDim." + name + " is " + std::to_string(block[axis]) + ", but must be 1 to " +
             std::to_string(kMostInBlock[axis]));
    }
    if (attributes.block[axis] != 0 && block[axis] != attributes.block[axis]) {
      refuse("blockDim." + name + " is " + std::to_string(block[axis]) + ", but the kernel is compiled for " +
             std::to_string(attributes.block[axis]));
    }
  }
  const uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  if (threads > attributes.max_threads) {
    refuse(std::to_string(threads) + " threads in a block, but " + std::to_string(attributes.max_threads) +
           " are the most" + (attributes.max_threads < kMostThreads ? " that its __launch_bounds__ allow" : ""));
  }
  // A warp lives in one of the four parts of a multiprocessor, with a quarter of the registers.
  constexpr uint64_t kParts = 4, kRegistersOfPart = 16 << 10;
  const uint64_t warps = (threads + 31) / 32, of_part = (warps + kParts - 1) / kParts;
  if (of_part * 32 * registers_of_thread(attributes) > kRegistersOfPart) {
    refuse(std::to_string(threads) + " threads in a block with " + std::to_string(attributes.regs) +
               " registers each, which a multiprocessor does not have: it has 65536",
           cudaErrorLaunchOutOfResources);
  }
  constexpr uint32_t kPortableCluster = 8, kMostInCluster = 16;
  const uint32_t most_in_cluster = attributes.large_cluster ? kMostInCluster : kPortableCluster;
  if (attributes.cluster > most_in_cluster) {
    refuse("clusters of " + std::to_string(attributes.cluster) + " blocks, but " + std::to_string(most_in_cluster) +
               " are the most" +
               (attributes.large_cluster ? "" : ": set CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED first"),
           cudaErrorInvalidClusterSize);
  }
  if (grid[0] % attributes.cluster != 0) {
    refuse("gridDim.x is " + std::to_string(grid[0]) + ", which is no multiple of its clusters of " +
               std::to_string(attributes.cluster),
           cudaErrorInvalidClusterSize);
  }
  if (dynamic_bytes > static_cast<uint32_t>(attributes.dyn_smem_max)) {
    refuse(std::to_string(dynamic_bytes) + " bytes of dynamic shared memory beside " +
           std::to_string(attributes.static_smem) + " of static, but " + std::to_string(attributes.dyn_smem_max) +
           " are allowed: set CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES first");
  }
}

}  // namespace

LoadedModule* load_module(const char* image) {
  need_context();
  std::string error;
  Module* const loaded = module_load(find_ptx(image), error);
  if (!loaded) fail(cudaErrorInvalidPtx, error);
  auto module = std::make_shared<LoadedModule>(loaded);
  const bool cubin = is_cubin(image);
  if (!runs_here(module_target(loaded), cubin)) {
    fail(cudaErrorNoKernelImageForDevice, "code for " + module_target(loaded) + " on a device of compute capability " +
                                              std::to_string(compute_capability()));
  }
  if (cubin) {
    for (const auto& [name, registers] : registers_of(image)) {
      if (Function* const function = module_function(loaded, name.c_str())) {
        function_attributes(function).regs = registers;
      }
    }
  }
  modules[module.get()] = module;
  return module.get();
}

LoadedModule* load_module_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(cudaErrorFileNotFound, std::string("cannot open ") + path);
  std::ostringstream content;
  content << file.rdbuf();
  std::string image = content.str();
  image.append(32, '\0');  // the search for the PTX looks a little behind the end
  return load_module(image.data());
}

void unload_module(void* handle) {
  LoadedModule& module = find_module(handle);
  module.unloaded = true;
  for (auto& [name, kernel] : module.kernels) kernels.erase(kernel.get());
  modules.erase(&module);
}

LoadedModule& find_module(void* handle) {
  auto found = modules.find(static_cast<LoadedModule*>(handle));
  if (found == modules.end()) fail(cudaErrorInvalidResourceHandle, "no such module, or one that is unloaded");
  return *found->second;
}

Kernel* get_kernel(void* handle, const char* name) {
  LoadedModule& module = find_module(handle);
  std::unique_ptr<Kernel>& kernel = module.kernels[name];
  if (!kernel) {
    Function* const function = module_function(module.module, name);
    if (!function) {
      module.kernels.erase(name);
      fail(cudaErrorSymbolNotFound, std::string("the module has no kernel ") + name);
    }
    kernel.reset(new Kernel{function, &module});
    Attributes& attributes = function_attributes(function);  // without the opt-in
    attributes.dyn_smem_max = std::max(0, kShared - static_cast<int>(attributes.static_smem));
    kernels.insert(kernel.get());
  }
  return kernel.get();
}

Kernel& find_kernel(void* handle) {
  Kernel* const kernel = static_cast<Kernel*>(handle);
  if (!kernels.count(kernel)) fail(cudaErrorInvalidResourceHandle, "no such kernel, or one whose module is unloaded");
  return *kernel;
}

int kernel_attribute(void* handle, int attribute) {
  const Attributes& attributes = function_attributes(find_kernel(handle).function);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      return attributes.max_threads;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      return attributes.static_smem;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES:
      return attributes.local;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      return attributes.regs;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION:
      return compute_capability();
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      return attributes.dyn_smem_max;
    case CU_FUNC_ATTRIBUTE_REQUIRED_CLUSTER_WIDTH:
      return attributes.cluster > 1 ? attributes.cluster : 0;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      return attributes.large_cluster;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      return -1;
    case CU_FUNC_ATTRIBUTE_CONST_SIZE_BYTES:
    case CU_FUNC_ATTRIBUTE_CACHE_MODE_CA:
      return 0;
    default:
      fail(cudaErrorInvalidValue,
           "cuFuncGetAttribute: the software device has no attribute " + std::to_string(attribute));
  }
}

void set_kernel_attribute(void* handle, int attribute, int value) {
  Attributes& attributes = function_attributes(find_kernel(handle).function);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES:
      if (value < 0 || value + static_cast<int64_t>(attributes.static_smem) > most_shared_memory()) {
        fail(cudaErrorInvalidValue,
             std::to_string(value) + " bytes of dynamic beside " + std::to_string(attributes.static_smem) +
                 " of static shared memory, but a block has " + std::to_string(most_shared_memory()));
      }
      attributes.dyn_smem_max = value;
      return;
    case CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED:
      attributes.large_cluster = value != 0;
      return;
    case CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT:
      return;
    default:
      fail(cudaErrorInvalidValue,
           "cuFuncSetAttribute: the software device cannot set attribute " + std::to_string(attribute));
  }
}

int blocks_per_multiprocessor(void* handle, int threads, size_t dynamic_bytes) {
  const Attributes& attributes = function_attributes(find_kernel(handle).function);
  const size_t reserved = 1024;  // shared memory that the system takes from every block
  const size_t shared = attributes.static_smem + dynamic_bytes + reserved;
  const size_t by_memory = (most_shared_memory() + reserved) / shared;
  const size_t some_threads = static_cast<size_t>(std::max(threads, 1));
  const size_t by_registers = (64 << 10) / (some_threads * std::max<size_t>(registers_of_thread(attributes), 1));
  return static_cast<int>(std::min<size_t>({by_memory, by_registers, 2048 / some_threads, 32}));
}

void enqueue_launch(void* handle, const uint32_t (&grid)[3], const uint32_t (&block)[3], uint32_t dynamic_bytes,
                    void* stream, void** params) {
  need_context();
  Kernel& kernel = find_kernel(handle);
  const int device = this_thread().device;
  if (kernel.module->device != device || find_stream(stream).device != device) {
    fail(cudaErrorInvalidResourceHandle,
         "launch of kernel " + function_name(kernel.function) + ": device " + std::to_string(device) +
             " is current, but the kernel was loaded on device " + std::to_string(kernel.module->device) +
             " and the stream belongs to device " + std::to_string(find_stream(stream).device));
  }
  check_launch(kernel, grid, block, dynamic_bytes);
  Launch now{{grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, dynamic_bytes, {}};
  const std::vector<Param>& declared = function_params(kernel.function);
  if (!declared.empty()) now.params.resize(declared.back().offset + declared.back().size);
  for (size_t i = 0; i < declared.size(); ++i) {
    memcpy(now.params.data() + declared[i].offset, params[i], declared[i].size);
  }
  const std::shared_ptr<LoadedModule> module = kernel.module->shared_from_this();
  Function* const function = kernel.function;
  const bool captured = find_stream(stream).capture != nullptr;
  enqueue(find_stream(stream), "a launch of " + function_name(function), [=]() -> std::string {
    if (captured && module->unloaded) {
      return "a graph launches kernel " + function_name(function) + ", whose module has been unloaded";
    }
    return launch(function, now);
  });
}

}  // namespace soft

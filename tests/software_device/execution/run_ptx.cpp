// A PTX text run on host memory, with neither driver nor CuPy: the entry of the device's own tests.
#include <algorithm>
#include <cstring>

#include "ptx/rule.hpp"

#define DEVICE_ENTRY extern "C" __attribute__((visibility("default")))

namespace {

using namespace soft;

int answer(const std::string& error, char* text, size_t size) {
  if (size) {
    const size_t length = std::min(size - 1, error.size());
    std::memcpy(text, error.data(), length);
    text[length] = 0;
  }
  return error.empty() ? 0 : 1;
}

// Memory of the host that kernels may use while this object lives.
class HostMemory {
 public:
  HostMemory(void* memory_, size_t bytes) : base_(reinterpret<u64>(memory_) + kOffset), bytes_(bytes) {
    const std::lock_guard<std::recursive_mutex> lock(memory().lock);
    if (bytes_) memory().regions[base_] = Region{base_, bytes_, kDeviceMemory};
  }
  ~HostMemory() {
    const std::lock_guard<std::recursive_mutex> lock(memory().lock);
    if (bytes_) memory().regions.erase(base_);
  }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

 private:
  u64 base_, bytes_;
};

}  // namespace

// What a kernel calls this address of the host.
DEVICE_ENTRY uint64_t device_address(const void* host_address) { return reinterpret<u64>(host_address) + kOffset; }

// Loads a module, launches its kernel on `memory` and waits. `shape` is grid, block and bytes of dynamic shared memory;
// `parameters` are laid out as the kernel declares them. Returns 0, or 1 and the error.
DEVICE_ENTRY int device_run_ptx(const char* ptx, const char* kernel, const uint32_t* shape, const void* parameters,
                                size_t parameter_bytes, void* host_memory, size_t bytes, char* error,
                                size_t error_size) {
  std::string problem;
  const std::unique_ptr<Module, void (*)(Module*)> module(module_load(ptx, problem), module_unload);
  if (!module) return answer(problem, error, error_size);
  Function* function = module_function(module.get(), kernel);
  if (!function) return answer("the module has no kernel " + std::string(kernel), error, error_size);
  const std::vector<Param>& declared = function_params(function);
  const size_t wanted = declared.empty() ? 0 : declared.back().offset + declared.back().size;
  if (wanted != parameter_bytes) {
    return answer(
        "the kernel has parameters of " + std::to_string(wanted) + " bytes, not of " + std::to_string(parameter_bytes),
        error, error_size);
  }
  Launch launch_;
  std::copy(shape, shape + 3, launch_.grid);
  std::copy(shape + 3, shape + 6, launch_.block);
  launch_.smem = shape[6];
  const char* begin = static_cast<const char*>(parameters);
  launch_.params.assign(begin, begin + parameter_bytes);
  const HostMemory visible(host_memory, bytes);
  return answer(launch(function, launch_), error, error_size);
}

// Loads a module and forgets it; a kernel that the device cannot run is an error here.
DEVICE_ENTRY int device_check_ptx(const char* ptx, char* error, size_t error_size) {
  std::string problem;
  const std::unique_ptr<Module, void (*)(Module*)> module(module_load(ptx, problem), module_unload);
  if (!module) return answer(problem, error, error_size);
  for (const auto& function : module->functions)
    if (!function.second->error.empty())
      return answer(function.first + ": " + function.second->error, error, error_size);
  return answer("", error, error_size);
}

// Whether the decoder's table has this opcode; 1 and the error where it does not.
DEVICE_ENTRY int device_check_opcode(const char* opcode, char* error, size_t error_size) {
  try {
    decode_opcode(opcode);
    return answer("", error, error_size);
  } catch (const std::exception& problem) {
    return answer(problem.what(), error, error_size);
  }
}

// Modules, kernels and their launches, as the driver API hands them out.
#pragma once

#include <map>
#include <memory>
#include <string>

#include "streams.hpp"
#include "../device.hpp"

namespace soft {

struct LoadedModule;

// What a CUfunction points to.
struct Kernel {
  Function* function;
  LoadedModule* module;
};

// What a CUmodule points to. Launches that are queued or captured keep it alive.
struct LoadedModule : std::enable_shared_from_this<LoadedModule> {
  explicit LoadedModule(Module* loaded) : module(loaded) {}
  ~LoadedModule() { module_unload(module); }
  Module* module;
  int device = this_thread().device;
  std::map<std::string, std::unique_ptr<Kernel>> kernels;
  bool unloaded = false;
};

// `image` is PTX, or a cubin of NVRTC with the PTX that it was made from behind it (plugin.py).
LoadedModule* load_module(const char* image);
LoadedModule* load_module_file(const char* path);
void unload_module(void* handle);
LoadedModule& find_module(void* handle);
Kernel* get_kernel(void* module, const char* name);
Kernel& find_kernel(void* handle);

int kernel_attribute(void* kernel, int attribute);
void set_kernel_attribute(void* kernel, int attribute, int value);
int blocks_per_multiprocessor(void* kernel, int threads, size_t dynamic_bytes);

void enqueue_launch(void* kernel, const uint32_t (&grid)[3], const uint32_t (&block)[3], uint32_t dynamic_bytes,
                    void* stream, void** params);

}  // namespace soft

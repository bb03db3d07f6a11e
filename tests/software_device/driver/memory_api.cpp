// The entry points of the CUDA runtime about memory.
// https://docs.nvidia.com/cuda/cuda-runtime-api/ sections "Memory Management" and "Stream Ordered Memory Allocator".
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>

#include "copies.hpp"
#include "failure.hpp"
#include "memory.hpp"
#include "pools.hpp"
#include "settings.hpp"
#include "streams.hpp"

namespace {

using namespace soft;

std::set<uint64_t> graph_memory;  // allocated by nodes of graphs; the addresses stay theirs

uint64_t address_of(void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

cudaError_t allocate_now(const char* name, void** pointer, size_t bytes, RegionKind kind) {
  return runtime_call(name, [&] {
    refuse_unsafe(name);
    this_thread().has_context = true;
    *pointer = allocate(bytes, kind);
  });
}

// The hardware waits for the whole device before it frees.
cudaError_t free_now(const char* name, void* pointer) {
  return runtime_call(name, [&] {
    this_thread().has_context = true;
    if (!pointer) return;
    refuse_unsafe(name);
    wait_quietly();
    release(address_of(pointer));
    leave_pool(address_of(pointer));
  });
}

cudaError_t allocate_in_order(const char* name, void** pointer, size_t bytes, cudaMemPool_t pool, cudaStream_t handle) {
  return runtime_call(name, [&] {
    Stream& stream = find_stream(handle);
    if (stream.capture) check_whole(*stream.capture);
    *pointer = allocate(bytes, kDeviceMemory, true);
    const uint64_t base = address_of(*pointer);
    if (!base) return;
    count_in_pool(pool, base, bytes);
    if (stream.capture) graph_memory.insert(base);
    constexpr bool kMustRun = true;
    auto live = [=] {
      begin_life(base);
      return std::string();
    };
    enqueue(stream, name, live, kMustRun);
  });
}

}  // namespace

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return allocate_now(__func__, pointer, bytes, kDeviceMemory); }

cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
  return allocate_now(__func__, pointer, bytes, kManagedMemory);
}

cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  return allocate_now(__func__, pointer, bytes, kPinnedMemory);
}

cudaError_t cudaFree(void* pointer) { return free_now(__func__, pointer); }
cudaError_t cudaFreeHost(void* pointer) { return free_now(__func__, pointer); }

cudaError_t cudaMallocAsync(void** pointer, size_t bytes, cudaStream_t stream) {
  return allocate_in_order(__func__, pointer, bytes, nullptr, stream);
}

cudaError_t cudaMallocFromPoolAsync(void** pointer, size_t bytes, cudaMemPool_t pool, cudaStream_t stream) {
  return allocate_in_order(__func__, pointer, bytes, pool, stream);
}

cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  return runtime_call(__func__, [&] {
    if (!pointer) return;
    const uint64_t base = address_of(pointer);
    if (graph_memory.count(base)) {  // every launch of the graph allocates and frees it anew
      enqueue(find_stream(stream), "cudaFreeAsync", [=] {
        end_life(base);
        return std::string();
      });
      return;
    }
    constexpr bool kMustRun = true;
    enqueue(
        find_stream(stream), "cudaFreeAsync",
        [=]() -> std::string {
          try {
            release(base);
            leave_pool(base);
          } catch (const Failure& failure) {
            return "cudaFreeAsync: " + failure.words;
          }
          return {};
        },
        kMustRun);
  });
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  return runtime_call(__func__, [&] {
    this_thread().has_context = true;
    *total_bytes = total_memory();
    *free_bytes = total_memory() - used_memory();
  });
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  return runtime_call(__func__, [&] {
    const Region* const region = memory().find(reinterpret_cast<uint64_t>(pointer));
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;
    if (!region) return;
    constexpr cudaMemoryType kTypes[] = {cudaMemoryTypeDevice, cudaMemoryTypeHost, cudaMemoryTypeManaged};
    attributes->type = kTypes[region->kind];
    attributes->device = region->device;
    attributes->devicePointer = const_cast<void*>(pointer);
    if (region->kind != kDeviceMemory) attributes->hostPointer = const_cast<void*>(pointer);
  });
}

cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return runtime_call(__func__, [&] { enqueue_copy("cudaMemcpy", to, from, bytes, find_stream(nullptr), true); });
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return runtime_call(__func__, [&] { enqueue_copy("cudaMemcpyAsync", to, from, bytes, find_stream(stream), false); });
}

cudaError_t cudaMemcpyPeer(void* to, int, const void* from, int, size_t bytes) {
  return runtime_call(__func__, [&] { enqueue_copy("cudaMemcpyPeer", to, from, bytes, find_stream(nullptr), true); });
}

cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t stream) {
  return runtime_call(__func__,
                      [&] { enqueue_copy("cudaMemcpyPeerAsync", to, from, bytes, find_stream(stream), false); });
}

cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  return runtime_call(__func__, [&] { enqueue_fill("cudaMemset", to, value, bytes, find_stream(nullptr)); });
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  return runtime_call(__func__, [&] { enqueue_fill("cudaMemsetAsync", to, value, bytes, find_stream(stream)); });
}

// Hints change nothing that can be observed.
#if CUDART_VERSION >= 13000
cudaError_t cudaMemPrefetchAsync(const void*, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  return runtime_call(__func__, [] {});
}
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, cudaMemLocation) {
  return runtime_call(__func__, [] {});
}
#else
cudaError_t cudaMemPrefetchAsync(const void*, size_t, int, cudaStream_t) {
  return runtime_call(__func__, [] {});
}
cudaError_t cudaMemAdvise(const void*, size_t, cudaMemoryAdvise, int) {
  return runtime_call(__func__, [] {});
}
#endif

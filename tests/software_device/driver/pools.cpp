// Memory pools of the runtime. They only count: an allocation in the order of a stream never shares its memory.
// https://docs.nvidia.com/cuda/cuda-runtime-api/ section "Stream Ordered Memory Allocator".
#include "pools.hpp"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <set>
#include <string>

#include "failure.hpp"
#include "memory.hpp"

namespace soft {

struct Pool {
  uint64_t used = 0, high = 0;
  uint64_t threshold = 0;                  // what is kept; nothing is, but it can be read back
  std::map<cudaMemPoolAttr, int> choices;  // of reuse: all allowed, nothing is reused
};

namespace {

std::map<int, Pool*> default_pools, current_pools;  // by device
std::set<Pool*> pools;
std::map<uint64_t, std::pair<Pool*, uint64_t>> owners;  // of live allocations

Pool* make_pool() { return *pools.insert(new Pool).first; }

Pool* pool_of(std::map<int, Pool*>& of, int device) {
  Pool*& pool = of[device];
  if (!pool) pool = &of == &default_pools ? make_pool() : pool_of(default_pools, device);
  return pool;
}

Pool& find_pool(void* handle) {
  Pool* const pool = static_cast<Pool*>(handle);
  if (!pools.count(pool)) fail(cudaErrorInvalidResourceHandle, "no such memory pool, or one that is destroyed");
  return *pool;
}

cudaMemPool_t handle_of(Pool* pool) { return reinterpret_cast<cudaMemPool_t>(pool); }

}  // namespace

void count_in_pool(void* handle, uint64_t base, uint64_t bytes) {
  Pool* const pool = handle ? &find_pool(handle) : pool_of(current_pools, this_thread().device);
  owners[base] = {pool, bytes};
  pool->used += bytes;
  pool->high = std::max(pool->high, pool->used);
}

void leave_pool(uint64_t base) {
  auto found = owners.find(base);
  if (found == owners.end()) return;
  if (pools.count(found->second.first)) found->second.first->used -= found->second.second;
  owners.erase(found);
}

}  // namespace soft

using namespace soft;

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int device) {
  return runtime_call(__func__, [&] { *pool = handle_of(pool_of(default_pools, device)); });
}

cudaError_t cudaDeviceGetMemPool(cudaMemPool_t* pool, int device) {
  return runtime_call(__func__, [&] { *pool = handle_of(pool_of(current_pools, device)); });
}

cudaError_t cudaDeviceSetMemPool(int device, cudaMemPool_t pool) {
  return runtime_call(__func__, [&] { current_pools[device] = &find_pool(pool); });
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  return runtime_call(__func__, [&] { *pool = handle_of(make_pool()); });
}

cudaError_t cudaMemPoolDestroy(cudaMemPool_t handle) {
  return runtime_call(__func__, [&] {
    Pool* const pool = &find_pool(handle);
    for (auto& [device, other] : default_pools) {
      if (other == pool) fail(cudaErrorInvalidValue, "the default pool of a device cannot be destroyed");
    }
    for (auto& [device, other] : current_pools) {
      if (other == pool) other = nullptr;  // then the default one is
    }
    pools.erase(pool);
    delete pool;
  });
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t) {
  return runtime_call(__func__, [&] { find_pool(pool); });
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t handle, cudaMemPoolAttr attribute, void* value) {
  return runtime_call(__func__, [&] {
    Pool& pool = find_pool(handle);
    uint64_t* const number = static_cast<uint64_t*>(value);
    switch (attribute) {
      case cudaMemPoolAttrReleaseThreshold:
        *number = pool.threshold;
        return;
      case cudaMemPoolAttrReservedMemCurrent:
      case cudaMemPoolAttrUsedMemCurrent:
        *number = pool.used;
        return;
      case cudaMemPoolAttrReservedMemHigh:
      case cudaMemPoolAttrUsedMemHigh:
        *number = pool.high;
        return;
      default:
        *static_cast<int*>(value) = pool.choices.count(attribute) ? pool.choices[attribute] : 1;
    }
  });
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t handle, cudaMemPoolAttr attribute, void* value) {
  return runtime_call(__func__, [&] {
    Pool& pool = find_pool(handle);
    switch (attribute) {
      case cudaMemPoolAttrReleaseThreshold:
        pool.threshold = *static_cast<uint64_t*>(value);
        return;
      case cudaMemPoolAttrReservedMemHigh:
      case cudaMemPoolAttrUsedMemHigh:
        if (*static_cast<uint64_t*>(value) != 0) fail(cudaErrorInvalidValue, "a high-water mark can be set to 0 only");
        pool.high = pool.used;
        return;
      case cudaMemPoolReuseFollowEventDependencies:
      case cudaMemPoolReuseAllowOpportunistic:
      case cudaMemPoolReuseAllowInternalDependencies:
        pool.choices[attribute] = *static_cast<int*>(value);
        return;
      default:
        fail(cudaErrorInvalidValue, "this attribute of a memory pool cannot be set");
    }
  });
}

// Twin of cuda_src/ptx/cp_async_bulk.cuh: boxes land, and are read, as late as allowed.
#pragma once

// The emulator's own, see tensor_map() in __init__.py. Only a copy that the launch itself makes is a map.
struct alignas(128) TensorMap {
  unsigned long long words[16];

  TensorMap() = default;
  TensorMap(const TensorMap& other) { ::emu::copy_tensor_map(words, other.words); }
};

namespace ptx {

__forceinline__ void prefetch_tensormap(const TensorMap* map, EMU_SITE) { ::emu::prefetch_tensormap(map, site); }

__forceinline__ void cp_async_bulk_tensor_load(void* smem_ptr, const TensorMap* map, unsigned long long* mbarrier,
                                               int c0, int c1, int c2, int c3, int c4, EMU_SITE) {
  const int c[5] = {c0, c1, c2, c3, c4};
  ::emu::cp_async_bulk_tensor_load(smem_ptr, map, mbarrier, c, site);
}

__forceinline__ void cp_async_bulk_tensor_store(const TensorMap* map, const void* smem_ptr, int c0, int c1, int c2,
                                                int c3, int c4, EMU_SITE) {
  const int c[5] = {c0, c1, c2, c3, c4};
  ::emu::cp_async_bulk_tensor_store(map, smem_ptr, c, site);
}

__forceinline__ void cp_async_bulk_commit(EMU_SITE) { ::emu::cp_async_bulk_commit(site); }

template <int kPending>
__forceinline__ void cp_async_bulk_wait_read(EMU_SITE) {
  static_assert(kPending >= 0, "a number of groups");
  ::emu::cp_async_bulk_wait_read(kPending, site);
}

}  // namespace ptx

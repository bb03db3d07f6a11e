// Twin of cuda_src/ptx/cp_async.cuh: copies land as late as allowed.
#pragma once

namespace ptx {

__forceinline__ void cp_async_16(void* smem_ptr, const void* global_ptr, int src_bytes, EMU_SITE) {
  ::emu::cp_async_16(smem_ptr, global_ptr, src_bytes, site);
}

__forceinline__ void cp_async_commit(EMU_SITE) { ::emu::cp_async_commit(site); }

template <int kPending>
__forceinline__ void cp_async_wait(EMU_SITE) {
  static_assert(kPending >= 0, "a number of groups");
  ::emu::cp_async_wait(kPending, site);
}

}  // namespace ptx

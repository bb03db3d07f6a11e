// Twin of cuda_src/ptx/named_barrier.cuh.
#pragma once

namespace ptx {

__forceinline__ void named_barrier_sync(int id, int threads, EMU_SITE) {
  ::emu::named_barrier(id, threads, true, site);
}

__forceinline__ void named_barrier_arrive(int id, int threads, EMU_SITE) {
  ::emu::named_barrier(id, threads, false, site);
}

}  // namespace ptx

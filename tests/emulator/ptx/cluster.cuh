// Twin of cuda_src/ptx/cluster.cuh. The cluster size comes from the launch.
#pragma once

#define CLUSTER_DIMS(blocks)

namespace ptx {

__forceinline__ int cluster_ctarank(EMU_SITE) { return ::emu::cluster_rank(site); }
__forceinline__ void cluster_arrive(EMU_SITE) { ::emu::cluster_arrive(false, site); }
__forceinline__ void cluster_arrive_relaxed(EMU_SITE) { ::emu::cluster_arrive(true, site); }
__forceinline__ void cluster_wait(EMU_SITE) { ::emu::cluster_wait(site); }

__forceinline__ unsigned int mapa(const void* smem_ptr, int cta_rank, EMU_SITE) {
  return ::emu::cluster_address(smem_ptr, cta_rank, site);
}

template <class T>
__forceinline__ void st_async(T* smem_ptr, T value, unsigned long long* mbarrier, int cta_rank, EMU_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "st.async writes 4, 8 or 16 bytes");
  ::emu::st_async(smem_ptr, &value, sizeof(T), mbarrier, cta_rank, site);
}

}  // namespace ptx

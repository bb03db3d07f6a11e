// Twin of cuda_src/ptx/mbarrier.cuh.
#pragma once

namespace ptx {

__forceinline__ void mbarrier_init(unsigned long long* mbarrier, int arrivals, EMU_SITE) {
  ::emu::mbarrier_init(mbarrier, arrivals, site);
}

__forceinline__ void fence_mbarrier_init(EMU_SITE) { ::emu::fence_mbarrier_init(site); }

__forceinline__ void mbarrier_arrive_expect_tx(unsigned long long* mbarrier, int bytes, EMU_SITE) {
  ::emu::mbarrier_arrive(mbarrier, bytes, site);
}

__forceinline__ void mbarrier_arrive(unsigned long long* mbarrier, EMU_SITE) {
  ::emu::mbarrier_arrive(mbarrier, 0, site);
}

__forceinline__ void mbarrier_wait(unsigned long long* mbarrier, int parity, EMU_SITE) {
  ::emu::mbarrier_wait(mbarrier, parity, false, site);
}

__forceinline__ void mbarrier_wait_cluster(unsigned long long* mbarrier, int parity, EMU_SITE) {
  ::emu::mbarrier_wait(mbarrier, parity, true, site);
}

}  // namespace ptx

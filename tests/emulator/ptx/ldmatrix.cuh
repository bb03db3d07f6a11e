// Twin of cuda_src/ptx/ldmatrix.cuh.
#pragma once

namespace ptx {

__forceinline__ void ldmatrix_x4(unsigned int (&r)[4], const void* smem_ptr, EMU_SITE) {
  ::emu::ldmatrix_x4(r, smem_ptr, false, site);
}

__forceinline__ void ldmatrix_x4_trans(unsigned int (&r)[4], const void* smem_ptr, EMU_SITE) {
  ::emu::ldmatrix_x4(r, smem_ptr, true, site);
}

__forceinline__ void stmatrix_x4(void* smem_ptr, const unsigned int (&r)[4], EMU_SITE) {
  ::emu::stmatrix_x4(smem_ptr, r, site);
}

}  // namespace ptx

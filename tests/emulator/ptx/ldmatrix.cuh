// Twin of cuda_src/ptx/ldmatrix.cuh.
#pragma once

namespace ptx {

struct SharedAddress {
  unsigned long long value;

  __forceinline__ SharedAddress(const void* smem_ptr) : value(reinterpret_cast<unsigned long long>(smem_ptr)) {}
  __forceinline__ SharedAddress offset(unsigned int flipped, unsigned int added) const {
    SharedAddress moved = *this;
    moved.value = (value ^ flipped) + added;
    return moved;
  }
};

__forceinline__ void ldmatrix_x4(unsigned int (&r)[4], SharedAddress src, EMU_SITE) {
  ::emu::ldmatrix_x4(r, reinterpret_cast<const void*>(src.value), false, site);
}

__forceinline__ void ldmatrix_x4_trans(unsigned int (&r)[4], SharedAddress src, EMU_SITE) {
  ::emu::ldmatrix_x4(r, reinterpret_cast<const void*>(src.value), true, site);
}

__forceinline__ void stmatrix_x4(void* smem_ptr, const unsigned int (&r)[4], EMU_SITE) {
  ::emu::stmatrix_x4(smem_ptr, r, site);
}

}  // namespace ptx

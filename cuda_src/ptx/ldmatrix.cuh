// 8x8 matrices of 16-bit elements between shared memory and a warp's registers, four at a time. Lane 8 i + j passes the
// address, a multiple of 16, of row j of matrix i; with g = lane / 4 and t = lane % 4, r[i] is row g of matrix i,
// columns 2 t (low half) and 2 t + 1.
#pragma once

namespace ptx {

// Where something lies in shared memory, as instructions take it.
struct SharedAddress {
  unsigned int value;  // bytes

  __device__ __forceinline__ SharedAddress(const void* smem_ptr)
      : value(static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr))) {}
  __device__ __forceinline__ SharedAddress offset(unsigned int flipped, unsigned int added) const {
    SharedAddress moved = *this;
    moved.value = (value ^ flipped) + added;
    return moved;
  }
};

// Loads four matrices.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
__device__ __forceinline__ void ldmatrix_x4(unsigned int (&r)[4], SharedAddress src) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(src.value)
               : "memory");
}

// Loads four matrices, each transposed.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-ldmatrix
__device__ __forceinline__ void ldmatrix_x4_trans(unsigned int (&r)[4], SharedAddress src) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(src.value)
               : "memory");
}

// Stores four matrices: the inverse of ldmatrix_x4 (sm_90 and newer).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
__device__ __forceinline__ void stmatrix_x4(void* smem_ptr, const unsigned int (&r)[4]) {
  const unsigned int dst = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

}  // namespace ptx

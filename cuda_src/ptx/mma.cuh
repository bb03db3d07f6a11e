// d += a * b by the tensor cores, one warp together (sm_80 and newer). With g = lane / 4 and t = lane % 4, d[i] is row
// g + 8 (i / 2), column 2 t + i % 2.
#pragma once

struct __half;
struct __nv_bfloat16;

namespace ptx {

template <class T>
constexpr bool kMmaHalf = false;
template <>
constexpr bool kMmaHalf<__half> = true;
template <class T>
constexpr bool kMmaBfloat16 = false;
template <>
constexpr bool kMmaBfloat16<__nv_bfloat16> = true;

// 16x8 += 16x16 * 16x8, two elements per register, the lower k in the low half. a[j]: row g + 8 (j % 2), k = 2 t + 8
// (j / 2); bj: k = 2 t + 8 j, column g; each and the next k. Sums in float32, not rounded but truncated.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned int (&a)[4], unsigned int b0,
                                             unsigned int b1) {
  static_assert(kMmaHalf<T> || kMmaBfloat16<T>, "T is __half or __nv_bfloat16");
  if constexpr (kMmaHalf<T>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// 16x8 += 16x8 * 8x8 of float32 bits whose low 13 are ignored, see cvt_rna_tf32. a[j]: row g + 8 (j % 2), k = t + 4
// (j / 2); bj: k = t + 4 j, column g.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned int (&a)[4], unsigned int b0,
                                                 unsigned int b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 8x8 += 8x4 * 4x8, in float64. a: row g, k = t; b: k = t, column g; d has rows 0 to 7 only.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
__device__ __forceinline__ void mma_m8n8k4_f64(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}

}  // namespace ptx

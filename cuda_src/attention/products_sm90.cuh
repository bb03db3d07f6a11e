// Products of matrices in panels by wgmma, and rows of panels that are no factors.
#pragma once

#include <attention/panels.cuh>
#include <ptx/wgmma.cuh>

// Starts d = A B^T on the tensor cores, and puts it into a group.
template <int kCount, class T, int kRows, int kCols>
__device__ __forceinline__ void start_product(float (&d)[kCount], Panels<T, 64, kCols> a, Panels<T, kRows, kCols> b) {
  using A = Panels<T, 64, kCols>;
  using B = Panels<T, kRows, kCols>;
  const unsigned int a_descriptor = ptx::wgmma_descriptor(a.base, 16), b_descriptor = ptx::wgmma_descriptor(b.base, 16);
#pragma unroll
  for (int i = 0; i < kCols / 16; ++i) {
    constexpr int kSteps = A::kSpan / 32;  // of a panel
    const int panel = i / kSteps, in_panel = i % kSteps * 32;
    ptx::wgmma_ss<T, kRows, A::kSpan>(d, a_descriptor, b_descriptor, i > 0, (panel * A::kPanelBytes + in_panel) / 16,
                                      (panel * B::kPanelBytes + in_panel) / 16);
  }
  ptx::wgmma_commit();
}

// Starts d += A B, with A in registers.
template <int kCount, int kSteps, class T, int kRows, int kCols>
__device__ __forceinline__ void start_sum(float (&d)[kCount], const unsigned int (&a)[kSteps][4],
                                          Panels<T, kRows, kCols> b) {
  static_assert(kSteps == kRows / 16, "16 rows of B in a step");
  using B = Panels<T, kRows, kCols>;
  const unsigned int descriptor = ptx::wgmma_descriptor(b.base, B::kPanelBytes);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) ptx::wgmma_rs<T, kCols, B::kSpan>(d, a[i], descriptor, true, i * B::kSpan);
  ptx::wgmma_commit();
}

// Rows first … last - 1 become 0, as thread `thread` of `threads`. wgmma sees the zeros of a thread behind its
// fence_proxy_async and a barrier.
template <class T, int kRows, int kCols>
__device__ __forceinline__ void clear_rows(Panels<T, kRows, kCols> tile, int first, int last, int thread, int threads) {
  constexpr int kChunks = kCols / 8;
#pragma unroll 1  // it is rare, and a loading warp has few registers
  for (int i = thread; i < (last - first) * kChunks; i += threads) {
    ptx::st_shared(reinterpret_cast<uint4*>(tile.chunk(first + i / kChunks, i % kChunks)), uint4{});
  }
}

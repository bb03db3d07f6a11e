// kRows rows of kCols 16-bit elements in shared memory as TMA writes and wgmma reads them: one panel after another,
// each with kSpan bytes of every row. Within a row of a panel, chunk c of 16 bytes lies at chunk c ^ swizzle(row).
#pragma once

#include <primitives/vector.cuh>
#include <ptx/cp_async_bulk.cuh>

template <class T, int kRows, int kCols>
struct Panels {
  static constexpr int kSpan = kCols % 64 == 0 ? 128 : 64;  // bytes
  static constexpr int kPanelCols = kSpan / sizeof(T), kPanels = kCols / kPanelCols;
  static constexpr int kPanelBytes = kRows * kSpan, kBytes = kPanels * kPanelBytes;
  static_assert(kCols % kPanelCols == 0 && kRows % 8 == 0, "whole panels, of whole swizzle patterns");

  unsigned char* base;  // a multiple of 8 kSpan

  // One box per panel; kBytes complete on `mbarrier`, also where the box reaches beyond the tensor.
  __device__ __forceinline__ void load(const TensorMap& map, unsigned long long* mbarrier, int c1, int c2, int c3,
                                       int c4) const {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      ptx::cp_async_bulk_tensor_load(base + i * kPanelBytes, &map, mbarrier, i * kPanelCols, c1, c2, c3, c4);
    }
  }

  __device__ __forceinline__ void store(const TensorMap& map, int c1, int c2, int c3, int c4) const {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      ptx::cp_async_bulk_tensor_store(&map, base + i * kPanelBytes, i * kPanelCols, c1, c2, c3, c4);
    }
  }

  static constexpr int kChunks = kSpan / 16;  // per row of a panel

  __device__ __forceinline__ unsigned char* chunk(int row, int column) const {
    return base + column / kChunks * kPanelBytes + row * kSpan +
           (column % kChunks ^ row / (8 / kChunks) % kChunks) * 16;
  }
  // The chunk `columns` to the right of one in column c, where c + columns = c ^ columns: one register serves all of
  // them.
  static __device__ __forceinline__ unsigned char* beyond(unsigned char* chunk, int columns) {
    const auto address = reinterpret_cast<unsigned long long>(chunk) ^ columns % kChunks * 16;
    return reinterpret_cast<unsigned char*>(address) + columns / kChunks * kPanelBytes;
  }
};

// The same for threads that write it: as Tile (attention/tile.cuh).
template <class T, int kRows, int kCols>
struct PanelTile {
  using Layout = Panels<T, kRows, kCols>;
  using Element = T;
  static constexpr int kPerChunk = 8, kChunks = kCols / kPerChunk;  // per row
  static constexpr int kRepeat = Layout::kChunks, kRowPitch = Layout::kPanelCols, kRepeatPitch = kRows * kRowPitch;
  using Chunk = Fragment<T, kPerChunk>;

  T* base;

  __device__ __forceinline__ T* chunk(unsigned int row, unsigned int column) const {
    const Layout panels{reinterpret_cast<unsigned char*>(base)};
    return reinterpret_cast<T*>(panels.chunk(static_cast<int>(row), static_cast<int>(column)));
  }
};

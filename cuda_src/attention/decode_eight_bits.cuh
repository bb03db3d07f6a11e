// K and V of caches of 8 bits: asynchronously, as bytes, to the end of a slot of the ring, and from there as T to the
// whole slot, once they have landed.
#pragma once

#include <attention/decode_load.cuh>

// Bytes of a tile of K or V, by the threads of a team, where rows are whole chunks of 16 bytes.
template <int kTeamThreads, int kKeys, int kCols>
__device__ __forceinline__ void load_bytes(unsigned char* to, const char* base, const long long (&stride)[4],
                                           int columns, const TileKeys<kKeys>& keys, KeyBits<kKeys> exist) {
  using Keys = TileKeys<kKeys>;
  constexpr int kChunks = kCols / 16, kTotal = kKeys * kChunks;
  long long at[Keys::kEach];  // bytes from the base to the rows of this lane's keys
#pragma unroll
  for (int i = 0; i < Keys::kEach; ++i) at[i] = keys.places[i].offset(stride);
#pragma unroll(kCols > 128 ? 1 : kKeys)  // of wide rows there are few registers
  for (int first = 0; first < kTotal; first += kTeamThreads) {
    const int chunk = first + static_cast<int>(threadIdx.x) % kTeamThreads;
    const int row = chunk / kChunks, column = chunk % kChunks * 16;
    const bool inside = (exist & KeyBits<kKeys>(1) << row) != 0 && column < columns;
    const long long offset = Keys::of_row(at, row);  // all lanes shuffle
    if (kTotal % kTeamThreads != 0 && chunk >= kTotal) continue;
    ptx::cp_async_16(to + chunk * 16, base + offset + column, inside ? 16 : 0);
  }
}

// The scales of the rows of a tile: loaded with it, and put into shared memory with the next one, when they are there.
template <int kKeys>
struct RowScales {
  static constexpr int kEach = TileKeys<kKeys>::kEach;
  float k[kEach], v[kEach];  // of this lane's keys
  bool loaded = false;

  __device__ __forceinline__ void load(const DecodeParams& p, const LoadSegment* of, const TileKeys<kKeys>& keys,
                                       KeyBits<kKeys> exist) {
    loaded = p.k_scale != nullptr || p.v_scale != nullptr;
    if (!loaded) return;
    const float *k_scale = ptx::ld_shared(&of->k.scale), *v_scale = ptx::ld_shared(&of->v.scale);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const KeyPlace& place = keys.places[i];
      const auto at = [&](const float* scale, const long long (&stride)[3]) {
        const bool exists = (exist >> keys.of_lane(i) & 1) != 0 && scale != nullptr;
        return exists ? ptx::ld_global(scale + place.page * stride[0] + place.row * stride[2]) : 1.0f;
      };
      k[i] = at(k_scale, p.k_scale_stride);
      v[i] = at(v_scale, p.v_scale_stride);
    }
  }
  // Of K, and behind them of V.
  __device__ __forceinline__ void put(float* to) {
    if (!loaded) return;
    loaded = false;
    if (static_cast<int>(threadIdx.x) % 32 >= kKeys) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = TileKeys<kKeys>::of_lane(i);
      ptx::st_shared(to + row, k[i]);
      ptx::st_shared(to + kKeys + row, v[i]);
    }
  }
};

// Bytes of a tile -> T. They may lie in the tile's own memory, as far as that is ahead of what is written: a barrier
// stands between both of a step. `scales`: of rows, in shared memory.
template <bool kE4m3, bool kScaled, int kTeamThreads, class T, int kKeys, int kCols, class Barrier>
__device__ __forceinline__ void convert_bytes(Tile<T, kKeys, kCols> tile, const unsigned char* from,
                                              const float* scales, Barrier barrier) {
  using Rows = Tile<T, kKeys, kCols>;
  using Acc = typename Select<kIsSame<T, double>, double, float>::Type;
  constexpr int kPerChunk = Rows::kPerChunk, kTotal = kKeys * Rows::kChunks;
  constexpr int kBatch = kCols <= 128 && kTotal % (8 * kTeamThreads) == 0 ? 8 : 4;
  using Bytes = Fragment<unsigned short, kPerChunk / 2>;  // in pairs
  static_assert(kTeamThreads % Rows::kRepeat == 0, "whole steps");
  const auto exists = [](int chunk) { return kTotal % (kBatch * kTeamThreads) == 0 || chunk < kTotal; };
#pragma unroll 1
  for (int step = 0; step < kTotal; step += kBatch * kTeamThreads) {
    const int first = step + static_cast<int>(threadIdx.x) % kTeamThreads;
    Bytes bytes[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int chunk = first + i * kTeamThreads;
      if (exists(chunk)) bytes[i] = ptx::ld_shared(reinterpret_cast<const Bytes*>(from) + chunk);
    }
    barrier();  // what this step overwrites, the whole team has read
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int chunk = first + i * kTeamThreads, row = chunk / Rows::kChunks;
      if (!exists(chunk)) continue;
      const float scale = kScaled ? ptx::ld_shared(scales + row) : 1.0f;
      typename Rows::Chunk values;
#pragma unroll
      for (int e = 0; e < kPerChunk; e += 2) {
        float pair[2];
        from_8_bits<kE4m3>(pair, bytes[i].element[e / 2]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          values.element[e + j] = from_acc<T>(kScaled ? static_cast<Acc>(pair[j]) * scale : static_cast<Acc>(pair[j]));
        }
      }
      ptx::st_shared(reinterpret_cast<typename Rows::Chunk*>(tile.chunk(row, chunk % Rows::kChunks)), values);
    }
  }
}

template <int kTeamThreads, class Rows, class Barrier>
__device__ __forceinline__ void convert_rows(const DecodeParams& p, Rows tile, const unsigned char* from, bool scaled,
                                             const float* scales, Barrier barrier) {
  if (p.cache_kind == kCacheE4m3) {
    scaled ? convert_bytes<true, true, kTeamThreads>(tile, from, scales, barrier)
           : convert_bytes<true, false, kTeamThreads>(tile, from, scales, barrier);
  } else {
    scaled ? convert_bytes<false, true, kTeamThreads>(tile, from, scales, barrier)
           : convert_bytes<false, false, kTeamThreads>(tile, from, scales, barrier);
  }
}

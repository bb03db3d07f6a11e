// Q, K and V of a decode kernel -> shared memory. What does not exist becomes zeros and is never read.
#pragma once

#include <attention/decode_rows.cuh>
#include <attention/tile.cuh>

// The keys of one tile as a team loads them. kAnyPage: keys of a tile may lie in several pages.
template <int kKeys, bool kAnyPage>
struct TileKeys {
  static constexpr int kEach = kAnyPage && kKeys > 32 ? kKeys / 32 : 1;  // keys of a lane: lane, lane + 32
  int page[kEach], in_page[kEach];

  // Begins to look up the pages of tile `tile`, well ahead of its load.
  __device__ __forceinline__ void look_up(const DecodeParams& p, int b, const Lengths& lengths, int tile) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int key = tile * kKeys + (kAnyPage ? lane % kKeys + 32 * i : 0);
      page[i] = b;
      in_page[i] = key;
      if (p.page_table == nullptr) continue;
      const int number = key / p.page_size;
      in_page[i] = key - number * p.page_size;
      page[i] = -1;
      if (key < lengths.end) {
        const long long found = ld_index(p, kPageTable, p.page_table, b * p.table_stride[0] + number * p.table_stride[1]);
        if (found >= 0 && found < p.pages) page[i] = static_cast<int>(found);
      }
    }
  }
  // Bit i: key i of the tile is one of the sequence, and its page exists.
  __device__ __forceinline__ unsigned long long exist(const Lengths& lengths, int tile) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    unsigned long long found = 0;
#pragma unroll
    for (int first = 0; first < kKeys; first += 32) {
      const int key = tile * kKeys + first + lane % kKeys;
      const bool exists = page[kEach > 1 ? first / 32 : 0] >= 0 && key >= lengths.begin && key < lengths.end;
      found |= static_cast<unsigned long long>(__ballot_sync(0xffffffff, exists)) << first;
    }
    return found;
  }
};

// Rows of a tile of K or V, by the threads of a team; `base` is row 0 of page 0 of their head, in their first column.
// kVector: asynchronously, in chunks of 16 bytes. Lanes whose keys lie in other pages say where these are.
template <bool kVector, int kTeamThreads, class T, int kKeys, int kCols, bool kAnyPage>
__device__ __forceinline__ void load_rows(Tile<T, kKeys, kCols> tile, const T* base, const long long (&stride)[4],
                                          int columns, const TileKeys<kKeys, kAnyPage>& keys,
                                          unsigned long long exist) {
  using Rows = Tile<T, kKeys, kCols>;
  constexpr int kRepeat = Rows::kRepeat, kPerChunk = Rows::kPerChunk, kAtOnce = kTeamThreads / kRepeat;
  static_assert(kAtOnce <= 32 ? 32 % kAtOnce == 0 : kAtOnce % 32 == 0, "rows of a step are of one word of lanes");
  const int thread = static_cast<int>(threadIdx.x) % kTeamThreads, row0 = thread / kRepeat, column0 = thread % kRepeat;
  long long from[TileKeys<kKeys, kAnyPage>::kEach];  // of this lane's keys
#pragma unroll
  for (int i = 0; i < TileKeys<kKeys, kAnyPage>::kEach; ++i) {
    from[i] = keys.page[i] * stride[0] + keys.in_page[i] * stride[2];
  }
#pragma unroll
  for (int i = 0; i < kKeys; i += kAtOnce) {
    const int row = row0 + i;
    if (kKeys % kAtOnce != 0 && row >= kKeys) break;
    const T* ptr = base + column0 * kPerChunk * stride[3];
    if constexpr (kAnyPage) {
      ptr += __shfl_sync(0xffffffff, from[i / 32 % TileKeys<kKeys, kAnyPage>::kEach], row % 32);
    } else {
      ptr += from[0] + row * stride[2];
    }
    const bool exists = (exist >> row & 1) != 0;
#pragma unroll
    for (int column = 0; column < Rows::kChunks; column += kRepeat) {
      T* to = tile.chunk(row, column0) + column * kPerChunk;
      const int left = exists ? columns - (column0 + column) * kPerChunk : 0;
      if constexpr (kVector) {
        ptx::cp_async_16(to, ptr + column * kPerChunk, left > 0 ? 16 : 0);
      } else {
        typename Rows::Chunk values;
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) {
          values.element[e] = e < left ? ptx::ld_global(ptr + (column * kPerChunk + e) * stride[3]) : T();
        }
        ptx::st_shared(reinterpret_cast<typename Rows::Chunk*>(to), values);
      }
    }
  }
}

// Q of a tile of rows, by all threads of the block.
template <bool kVector, int kThreads, class T, int kRows, int kDim>
__device__ __forceinline__ void load_queries(Tile<T, kRows, kDim> tile, const RowTile& rows) {
  using Rows = Tile<T, kRows, kDim>;
  const DecodeParams& p = rows.p;
  for (int index = static_cast<int>(threadIdx.x); index < kRows * Rows::kChunks; index += kThreads) {
    const int row = index / Rows::kChunks, column = index % Rows::kChunks * Rows::kPerChunk;
    typename Rows::Chunk values{};
    if (row < rows.count && !rows.is_padding(row) && column < p.head_dim) {
      const T* ptr = static_cast<const T*>(p.q) + rows.b * p.q_stride[0] + rows.query_head(row) * p.q_stride[1] +
                     rows.query(row) * p.q_stride[2] + column * p.q_stride[3];
      if constexpr (kVector) {
        values = ptx::ld_global(reinterpret_cast<const typename Rows::Chunk*>(ptr));
      } else {
#pragma unroll
        for (int e = 0; e < Rows::kPerChunk; ++e) {
          if (column + e < p.head_dim) values.element[e] = ptx::ld_global(ptr + e * p.q_stride[3]);
        }
      }
    }
    ptx::st_shared(reinterpret_cast<typename Rows::Chunk*>(tile.chunk(row, column / Rows::kPerChunk)), values);
  }
}

// The rows of V that a mask hides from every row of the team become zeros: 0 * NaN is not 0. `seen`: by a lane's rows.
template <int kTeam, class T, int kKeys, int kCols, class Barrier>
__device__ __forceinline__ void hide_values(Tile<T, kKeys, kCols> tile, unsigned long long* seen_by,
                                            unsigned long long seen, unsigned long long exist, Barrier barrier) {
  using Rows = Tile<T, kKeys, kCols>;
  const int thread = static_cast<int>(threadIdx.x) % (32 * kTeam);
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) seen |= __shfl_xor_sync(0xffffffff, seen, delta);
  if (thread % 32 == 0) ptx::st_shared(seen_by + thread / 32, seen);
  barrier();  // what each warp of the team sees
#pragma unroll
  for (int w = 0; w < kTeam; ++w) seen |= ptx::ld_shared(seen_by + w);
  for (int index = thread; index < kKeys * Rows::kChunks; index += 32 * kTeam) {
    const int row = index / Rows::kChunks;
    if ((exist & ~seen) >> row & 1) {
      ptx::st_shared(reinterpret_cast<typename Rows::Chunk*>(tile.chunk(row, index % Rows::kChunks)),
                     typename Rows::Chunk{});
    }
  }
  barrier();  // the zeros, before any warp multiplies with them; and `seen_by` is read
}

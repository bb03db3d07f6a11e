// Q, K and V of a decode kernel -> shared memory. What does not exist becomes zeros and is never read.
#pragma once

#include <attention/decode_rows.cuh>
#include <attention/tile.cuh>

// Rows of K or V of one head of a sequence, in memory.
struct CacheRows {
  const char* base;    // row 0 of page 0, first column
  const char* fresh;   // the first new row of the sequence, first column; null: none
  const float* scale;  // of 8 bits: that of row 0 of page 0; null: none
};

// What the loads of a team need of a segment.
struct LoadSegment {
  CacheRows k, v;
  int b, old, begin, end;  // of its Lengths
  int first_column;        // of V
  int unused = 0;

  __device__ __forceinline__ LoadSegment() {}
  template <int kKeys>
  __device__ __forceinline__ LoadSegment(const DecodeParams& p, const KeyCursor<kKeys>& at, int value_columns, int item)
      : b(at.b), old(at.lengths.old), begin(at.lengths.begin), end(at.lengths.end), first_column(at.column * value_columns) {
    const long long of_item = p.cache_kind == kCacheOfT ? item : 1;
    const long long sequence = at.b, head = at.head, column = first_column;
    const char* k_new = static_cast<const char*>(p.k_new);
    const char* v_new = p.v_new == nullptr ? k_new : static_cast<const char*>(p.v_new);
    k.base = static_cast<const char*>(p.k) + head * p.k_stride[1] * of_item;
    v.base = static_cast<const char*>(p.v) + (head * p.v_stride[1] + column * p.v_stride[3]) * of_item;
    k.fresh = v.fresh = nullptr;
    if (k_new != nullptr) {
      k.fresh = k_new + (sequence * p.k_new_stride[0] + head * p.k_new_stride[1]) * item;
      v.fresh = v_new + (sequence * p.v_new_stride[0] + head * p.v_new_stride[1] + column * p.v_new_stride[3]) * item;
    }
    k.scale = p.k_scale == nullptr ? nullptr : p.k_scale + head * p.k_scale_stride[1];
    v.scale = p.v_scale == nullptr ? nullptr : p.v_scale + head * p.v_scale_stride[1];
  }
};

// The keys of one tile as a team loads them: lane l has keys l, l + 32, … of the tile.
template <int kKeys>
struct TileKeys {
  static constexpr int kEach = kKeys > 32 ? kKeys / 32 : 1;
  KeyPlace places[kEach];

  // Begins to look up the pages of tile `tile`, well ahead of its load.
  __device__ __forceinline__ void look_up(const DecodeParams& p, const LoadSegment& of, int tile) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int key = tile * kKeys + static_cast<int>(threadIdx.x) % 32 % kKeys + 32 * i;
      places[i] = KeyPlace(p, of.b, key, key < of.end);
    }
  }
  // Bit i: key i of the tile is one that a query sees, and its page exists.
  __device__ __forceinline__ unsigned long long exist(const LoadSegment& of, int tile) const {
    unsigned long long found = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int key = tile * kKeys + static_cast<int>(threadIdx.x) % 32 % kKeys + 32 * i;
      const bool exists = places[i].page >= 0 && key >= of.begin && key < of.end;
      found |= static_cast<unsigned long long>(__ballot_sync(0xffffffff, exists)) << 32 * i;
    }
    return found;
  }
};

// A number of a cache of 8 bits; e4m3 by its bits: 4 of the exponent, 3 of the mantissa, no infinity.
__device__ __forceinline__ float from_8_bits(int kind, unsigned char bits) {
  if (kind == kCacheInt8) return static_cast<float>(static_cast<signed char>(bits));
  const unsigned int magnitude = bits & 0x7f;
  const float value = magnitude == 0x7f ? Limits<float>::nan() : __uint_as_float(magnitude << 20) * 0x1p120f;
  return bits & 0x80 ? -value : value;
}

// Rows of a tile of K or V, by the threads of a team; asynchronously in chunks of 16 bytes, where rows allow it. Lanes
// whose keys they are say where they lie.
template <int kTeamThreads, class T, int kKeys, int kCols>
__device__ __forceinline__ void load_rows(const DecodeParams& p, Tile<T, kKeys, kCols> tile, const CacheRows& from,
                                          const long long (&stride)[4], const long long (&new_stride)[4],
                                          const long long (&scale_stride)[3], int columns, const TileKeys<kKeys>& keys,
                                          int first_key, int old, unsigned long long exist) {
  using Rows = Tile<T, kKeys, kCols>;
  using Chunk = typename Rows::Chunk;
  using Acc = typename Select<kIsSame<T, double>, double, float>::Type;
  constexpr int kEach = TileKeys<kKeys>::kEach;
  constexpr int kRepeat = Rows::kRepeat, kPerChunk = Rows::kPerChunk, kAtOnce = kTeamThreads / kRepeat;
  static_assert(kKeys % kAtOnce == 0 && (kAtOnce <= 32 ? 32 % kAtOnce == 0 : kAtOnce % 32 == 0), "whole steps of rows");
  const int thread = static_cast<int>(threadIdx.x) % kTeamThreads, row0 = thread / kRepeat, column0 = thread % kRepeat;
  const bool is_t = p.cache_kind == kCacheOfT;
  unsigned long long start[kEach];  // of the rows of this lane's keys
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int key = first_key + static_cast<int>(threadIdx.x) % 32 % kKeys + 32 * i;
    long long row = keys.places[i].page * stride[0] + keys.places[i].row * stride[2];
    if (from.fresh != nullptr && key >= old) row = (key - old) * new_stride[2];
    start[i] = reinterpret_cast<unsigned long long>(from.fresh != nullptr && key >= old ? from.fresh : from.base) +
               row * (is_t ? sizeof(T) : 1);
  }
  const auto start_of_row = [&](int step) {  // of this thread in the step
    return __shfl_sync(0xffffffff, step < 32 ? start[0] : start[kEach - 1], (row0 + step) % 32);
  };
  if (is_t && p.vector && (from.fresh == nullptr || p.new_is_vector)) {
#pragma unroll(kCols > 128 ? 1 : kKeys)
    for (int i = 0; i < kKeys; i += kAtOnce) {
      const int row = row0 + i;
      const char* ptr = reinterpret_cast<const char*>(start_of_row(i));
      const bool exists = (exist >> row & 1) != 0;
#pragma unroll
      for (int column = 0; column < Rows::kChunks; column += kRepeat) {
        const bool inside = exists && (column0 + column) * kPerChunk < columns;
        ptx::cp_async_16(tile.chunk(row, column0) + column * kPerChunk, ptr + (column0 + column) * 16, inside ? 16 : 0);
      }
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kKeys; i += kAtOnce) {
    const int row = row0 + i;
    const unsigned long long ptr = start_of_row(i);
    const bool exists = (exist >> row & 1) != 0, is_fresh = from.fresh != nullptr && first_key + row >= old;
    const long long column_stride = is_fresh ? new_stride[3] : stride[3];
    float scale = 1;
    if (from.scale != nullptr) {
      const KeyPlace& mine = kEach > 1 && i / 32 != 0 ? keys.places[kEach - 1] : keys.places[0];
      const long long place = mine.page * scale_stride[0] + mine.row * scale_stride[2];
      const long long at = __shfl_sync(0xffffffff, place, row % 32);
      if (exists) scale = ptx::ld_global(from.scale + at);
    }
#pragma unroll 1
    for (int column = column0; column < Rows::kChunks; column += kRepeat) {
      const int first = column * kPerChunk, left = exists ? columns - first : 0;
      Chunk values{};
      if (is_t) {
        const T* elements = reinterpret_cast<const T*>(ptr);
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) {
          if (e < left) values.element[e] = ptx::ld_global(elements + (first + e) * column_stride);
        }
      } else {
        const unsigned char* elements = reinterpret_cast<const unsigned char*>(ptr);
        Fragment<unsigned char, kPerChunk> bytes{};
        if (p.vector && left >= kPerChunk) {
          bytes = ptx::ld_global(reinterpret_cast<const Fragment<unsigned char, kPerChunk>*>(elements + first));
        } else {
#pragma unroll
          for (int e = 0; e < kPerChunk; ++e) {
            if (e < left) bytes.element[e] = ptx::ld_global(elements + (first + e) * column_stride);
          }
        }
#pragma unroll
        for (int e = 0; e < kPerChunk; ++e) {
          values.element[e] = from_acc<T>(static_cast<Acc>(from_8_bits(p.cache_kind, bytes.element[e])) * scale);
        }
      }
      ptx::st_shared(reinterpret_cast<Chunk*>(tile.chunk(row, column)), values);
    }
  }
}

// Q of a tile of rows, by all threads of the block.
template <int kThreads, class T, int kRows, int kDim>
__device__ __forceinline__ void load_queries(Tile<T, kRows, kDim> tile, const RowTile& rows) {
  using Rows = Tile<T, kRows, kDim>;
  const DecodeParams& p = rows.p;
#pragma unroll 1
  for (int index = static_cast<int>(threadIdx.x); index < kRows * Rows::kChunks; index += kThreads) {
    const int row = index / Rows::kChunks, column = index % Rows::kChunks * Rows::kPerChunk;
    typename Rows::Chunk values{};
    if (row < rows.count && !rows.is_padding(row) && column < p.head_dim) {
      const T* ptr = static_cast<const T*>(p.q) + rows.b * p.q_stride[0] + rows.query_head(row) * p.q_stride[1] +
                     rows.query(row) * p.q_stride[2] + column * p.q_stride[3];
      if (p.vector) {
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
#pragma unroll 1
  for (int index = thread; index < kKeys * Rows::kChunks; index += 32 * kTeam) {
    const int row = index / Rows::kChunks;
    if ((exist & ~seen) >> row & 1) {
      ptx::st_shared(reinterpret_cast<typename Rows::Chunk*>(tile.chunk(row, index % Rows::kChunks)),
                     typename Rows::Chunk{});
    }
  }
  barrier();  // the zeros, before any warp multiplies with them; and `seen_by` is read
}

// Q, K and V of a decode kernel -> shared memory. What does not exist becomes zeros and is never read.
#pragma once

#include <attention/decode_rows.cuh>
#include <attention/tile.cuh>
#include <ptx/math.cuh>

// Rows of K or V of one head of a sequence, in memory.
struct CacheRows {
  const char* base;    // row 0 of page 0, first column
  const char* fresh;   // the first new row of the sequence, first column; null: none
  const float* scale;  // of 8 bits: that of row 0 of page 0; null: none
};

// What the loads of a team need of a segment.
struct LoadSegment {
  CacheRows k, v;
  const char* table;       // table_row
  int b, old, begin, end;  // sequence, and of its Lengths
  int value_columns;       // to load, from the first one on
  int filler = 0;          // whole 8 bytes

  __device__ __forceinline__ LoadSegment() {}
  template <int kKeys>
  __device__ __forceinline__ LoadSegment(const DecodeParams& p, const KeyCursor<kKeys>& at, int columns, int item)
      : table(table_row(p, at.b)), b(at.b), old(at.lengths.old), begin(at.lengths.begin), end(at.lengths.end) {
    const long long of_item = p.cache_kind == kCacheOfT ? item : 1;
    const long long sequence = at.b, head = at.head, column = static_cast<long long>(at.column) * columns;
    const char* k_new = static_cast<const char*>(p.k_new);
    const char* v_new = p.v_new == nullptr ? k_new : static_cast<const char*>(p.v_new);
    value_columns = p.values_in_keys ? 0 : p.value_dim - static_cast<int>(column);
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

// A bit for each key of a tile.
template <int kKeys>
using KeyBits = typename Select<(kKeys > 32), unsigned long long, unsigned int>::Type;

// The keys of one tile as a team loads them: lane l has keys l, l + 32, … of the tile.
template <int kKeys>
struct TileKeys {
  static constexpr int kEach = kKeys > 32 ? kKeys / 32 : 1;
  KeyPlace places[kEach];

  static __device__ __forceinline__ int of_lane(int i) { return static_cast<int>(threadIdx.x) % 32 % kKeys + 32 * i; }
  // Begins to look up the pages of keys `first` and on, well ahead of their load.
  __device__ __forceinline__ void look_up(const DecodeParams& p, const LoadSegment* of, int first) {
    const int b = ptx::ld_shared(&of->b), end = ptx::ld_shared(&of->end);
    const char* table = ptx::ld_shared(&of->table);
#pragma unroll
    for (int i = 0; i < kEach; ++i) places[i] = KeyPlace(p, b, table, first + of_lane(i), first + of_lane(i) < end);
  }
  // Bit i: key first + i is one that a query sees, and its page exists.
  __device__ __forceinline__ KeyBits<kKeys> exist(int begin, int end, int first) const {
    KeyBits<kKeys> found = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int key = first + of_lane(i);
      const unsigned int exists = __ballot_sync(0xffffffff, places[i].page >= 0 && key >= begin && key < end);
      found |= static_cast<KeyBits<kKeys>>(exists) << 32 * i;
    }
    return found;
  }
  // Of lane-wise values of keys that of this thread's row.
  template <class Value>
  static __device__ __forceinline__ Value of_row(const Value (&values)[kEach], int row) {
    return __shfl_sync(0xffffffff, row < 32 ? values[0] : values[kEach - 1], row % 32);
  }
};

// Two numbers of a cache of 8 bits, the low byte first. Of int8, x + 128 are the last bits of 2^23 + x + 128.
template <bool kE4m3>
__device__ __forceinline__ void from_8_bits(float (&x)[2], unsigned int bits) {
  if constexpr (kE4m3) return ptx::cvt_f32_e4m3x2(x, bits);
  bits ^= 0x8080;
  x[0] = __uint_as_float(0x4b000000 | bits & 0xff) - (0x1p23f + 128);
  x[1] = __uint_as_float(0x4b000000 | bits >> 8 & 0xff) - (0x1p23f + 128);
}

// How the threads of a team share the chunks of a tile.
template <class Rows, int kKeys, int kTeamThreads>
struct Sharing {
  static constexpr int kRepeat = Rows::kRepeat, kAtOnce = kTeamThreads / kRepeat;  // chunks, rows of a step
  static_assert(kKeys % kAtOnce == 0 && (kAtOnce <= 32 ? 32 % kAtOnce == 0 : kAtOnce % 32 == 0), "whole steps of rows");
  int row = static_cast<int>(threadIdx.x) % kTeamThreads / kRepeat;  // of the first step
  int column = static_cast<int>(threadIdx.x) % kRepeat;              // chunk
};

// Rows row, row + kAtOnce, … of a tile, asynchronously in chunks of 16 bytes: those of one thread. The swizzle repeats
// every 8 rows, so that addresses in shared memory differ by constants from those of the first of them.
template <int kAtOnce, class Rows, int kKeys>
struct ChunkCopies {
  using T = typename Rows::Element;
  static constexpr int kColumns = Rows::kChunks / Rows::kRepeat, kBases = kAtOnce < 8 ? 8 / kAtOnce : 1;
  T* to[kBases];
  KeyBits<kKeys> exist[kColumns];  // from this thread's row on; of chunks beyond the last column none

  __device__ __forceinline__ ChunkCopies(Rows tile, int row, int column, int columns, KeyBits<kKeys> bits) {
#pragma unroll
    for (int i = 0; i < kBases; ++i) to[i] = tile.chunk(row + i * kAtOnce, column);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      exist[i] = (column + i * Rows::kRepeat) * Rows::kPerChunk < columns ? bits >> row : 0;
    }
  }
  // `from`: this thread's first chunk of the row.
  __device__ __forceinline__ void copy(int step, const char* from) const {
    T* row = to[step / kAtOnce % kBases] + (step - step / kAtOnce % kBases * kAtOnce) * Rows::kRowPitch;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      ptx::cp_async_16(row + i * Rows::kRepeatPitch, from + i * Rows::kRepeat * 16,
                       (exist[i] & KeyBits<kKeys>(1) << step) != 0 ? 16 : 0);
    }
  }
};

struct NoCopies {
  template <class... Args>
  __device__ __forceinline__ NoCopies(const Args&...) {}
  __device__ __forceinline__ void copy(int, const char*) const {}
};

// K and V of a tile, by the threads of a team, where rows are whole chunks of 16 bytes. V of no columns: K alone.
template <int kTeamThreads, int kKeys, class KRows, class VRows>
__device__ __forceinline__ void load_chunks(const DecodeParams& p, KRows k, VRows v, const LoadSegment* of,
                                            const TileKeys<kKeys>& keys, int first, KeyBits<kKeys> exist) {
  using T = typename KRows::Element;
  using Share = Sharing<KRows, kKeys, kTeamThreads>;
  using Keys = TileKeys<kKeys>;
  constexpr bool kIsWide = KRows::kChunks * KRows::kPerChunk > 128;
  static_assert(Share::kRepeat == VRows::kRepeat, "K and V are shared out alike");
  const Share share;
  const char *k_base = ptx::ld_shared(&of->k.base), *v_base = ptx::ld_shared(&of->v.base);
  const int own = share.column * 16;  // bytes
  const int value_columns = ptx::ld_shared(&of->value_columns), old = ptx::ld_shared(&of->old);
  const ChunkCopies<Share::kAtOnce, KRows, kKeys> k_copies(k, share.row, share.column, p.head_dim, exist);
  using ValueCopies = ChunkCopies<Share::kAtOnce, VRows, kKeys>;
  const typename Select<(VRows::kChunks > 0), ValueCopies, NoCopies>::Type v_copies(v, share.row, share.column,
                                                                                    value_columns, exist);
  long long at[Keys::kEach];  // bytes from the base to the rows of this lane's keys
#pragma unroll
  for (int i = 0; i < Keys::kEach; ++i) at[i] = keys.places[i].offset(p.k_stride) * static_cast<int>(sizeof(T));
  if (p.same_strides && (p.k_new == nullptr || first + kKeys <= old)) {
#pragma unroll(kIsWide ? 2 : kKeys)  // of wide rows there are few registers
    for (int step = 0; step < kKeys; step += Share::kAtOnce) {
      const long long offset = Keys::of_row(at, share.row + step);
      k_copies.copy(step, k_base + own + offset);
      v_copies.copy(step, v_base + own + offset);
    }
    return;
  }
  unsigned long long k_at[Keys::kEach], v_at[Keys::kEach];  // addresses of rows
#pragma unroll
  for (int i = 0; i < Keys::kEach; ++i) {
    const long long fresh = first + Keys::of_lane(i) - old;
    const long long v_offset = keys.places[i].offset(p.v_stride) * static_cast<int>(sizeof(T));
    k_at[i] = reinterpret_cast<unsigned long long>(k_base + at[i]);
    v_at[i] = reinterpret_cast<unsigned long long>(v_base + v_offset);
    if (p.k_new == nullptr || fresh < 0) continue;
    const char *k_new = ptx::ld_shared(&of->k.fresh), *v_new = ptx::ld_shared(&of->v.fresh);
    k_at[i] = reinterpret_cast<unsigned long long>(k_new + fresh * p.k_new_stride[2] * static_cast<int>(sizeof(T)));
    v_at[i] = reinterpret_cast<unsigned long long>(v_new + fresh * p.v_new_stride[2] * static_cast<int>(sizeof(T)));
  }
#pragma unroll(kIsWide ? 2 : kKeys)  // of wide rows there are few registers
  for (int step = 0; step < kKeys; step += Share::kAtOnce) {
    k_copies.copy(step, reinterpret_cast<const char*>(Keys::of_row(k_at, share.row + step)) + own);
    v_copies.copy(step, reinterpret_cast<const char*>(Keys::of_row(v_at, share.row + step)) + own);
  }
}

// Rows of a tile of K or V, element by element: any strides, and caches of 8 bits, which become T.
template <int kTeamThreads, int kKeys, class Rows>
__device__ __forceinline__ void load_elements(const DecodeParams& p, Rows tile, const CacheRows* of,
                                              const long long (&stride)[4], const long long (&new_stride)[4],
                                              const long long (&scale_stride)[3], int columns,
                                              const TileKeys<kKeys>& keys, int fresh, KeyBits<kKeys> exist) {
  using T = typename Rows::Element;
  using Acc = typename Select<kIsSame<T, double>, double, float>::Type;
  using Share = Sharing<Rows, kKeys, kTeamThreads>;
  using Keys = TileKeys<kKeys>;
  constexpr int kPerChunk = Rows::kPerChunk;
  const Share share;
  const CacheRows from = get_shared(of);
  const bool is_t = p.cache_kind == kCacheOfT;
  long long at[Keys::kEach], scale_at[Keys::kEach];  // elements from the base
#pragma unroll
  for (int i = 0; i < Keys::kEach; ++i) {
    at[i] = keys.places[i].offset(stride);
    scale_at[i] = keys.places[i].page * scale_stride[0] + keys.places[i].row * scale_stride[2];
  }
#pragma unroll 1
  for (int row = share.row; row < kKeys; row += Share::kAtOnce) {
    const bool exists = (exist >> row & 1) != 0, is_fresh = from.fresh != nullptr && row >= fresh;
    const long long cached = Keys::of_row(at, row), scale_of_row = Keys::of_row(scale_at, row);
    const long long element = is_fresh ? (row - fresh) * new_stride[2] : cached;
    const long long column_stride = is_fresh ? new_stride[3] : stride[3];
    const T* elements = reinterpret_cast<const T*>(is_fresh ? from.fresh : from.base) + element;
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(from.base) + element;
    const Acc scale = from.scale != nullptr && exists ? ptx::ld_global(from.scale + scale_of_row) : 1.0f;
#pragma unroll 1
    for (int column = share.column; column < Rows::kChunks; column += Share::kRepeat) {
      const int first = column * kPerChunk, left = exists ? columns - first : 0;
      typename Rows::Chunk values{};
#pragma unroll
      for (int e = 0; e < kPerChunk; ++e) {
        if (e >= left) continue;
        const long long next = (first + e) * column_stride;
        if (is_t) {
          values.element[e] = ptx::ld_global(elements + next);
        } else {
          float number[2];
          const unsigned int bits = ptx::ld_global(bytes + next);
          p.cache_kind == kCacheE4m3 ? from_8_bits<true>(number, bits) : from_8_bits<false>(number, bits);
          values.element[e] = from_acc<T>(static_cast<Acc>(number[0]) * scale);
        }
      }
      ptx::st_shared(reinterpret_cast<typename Rows::Chunk*>(tile.chunk(row, column)), values);
    }
  }
}

// Q of a tile of rows, by all threads of the block.
template <int kThreads, int kRows, class Rows>
__device__ __forceinline__ void load_queries(Rows tile, const RowTile& rows) {
  using T = typename Rows::Element;
  const DecodeParams& p = rows.p;
#pragma unroll 1
  for (int index = static_cast<int>(threadIdx.x); index < kRows * Rows::kChunks; index += kThreads) {
    const int row = index / Rows::kChunks, column = index % Rows::kChunks * Rows::kPerChunk;
    typename Rows::Chunk values{};
    if (!rows.is_padding(row) && column < p.head_dim) {
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
__device__ __forceinline__ void hide_values(Tile<T, kKeys, kCols> tile, KeyBits<kKeys>* seen_by, KeyBits<kKeys> seen,
                                            KeyBits<kKeys> exist, Barrier barrier) {
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

// Tiles of keys on their way from the cache to a team: a ring of slots in shared memory, filled ahead of the products.
// It goes on over segments, so that loads never pause.
#pragma once

#include <attention/decode_eight_bits.cuh>

// Shared memory of one warp that loads.
template <int kKeys, int kStages>
struct RingState {
  KeyCursor<kKeys> cursor;  // the segment that is being loaded
  LoadSegment segment;
  KeyBits<kKeys> exists[kStages];  // keys of each slot
};

// Every kTeams-th tile of each segment, from the team's first one on, by kThreads threads. A slot holds kKeys rows of
// K, and behind them those of V; kValueDim = 0: V is columns of K. Rows: as Tile.
template <class T, int kTeams, int kThreads, int kKeys, int kDim, int kValueDim, int kStages,
          template <class, int, int> class Rows = Tile>
struct Ring {
  using Bits = KeyBits<kKeys>;
  using KTile = Rows<T, kKeys, kDim>;
  using VTile = Rows<T, kKeys, kValueDim>;
  using State = RingState<kKeys, kStages>;
  static constexpr int kSlot = kKeys * (kDim + kValueDim);  // elements
  static constexpr int kScales = 2 * kKeys;                 // of a slot

  const DecodeParams& p;
  T* slots;
  State* state;       // of this warp
  float* row_scales;  // of caches of 8 bits
  int team;
  bool is_first;  // warp of the team
  TileKeys<kKeys> keys;
  int at, stop;  // the next tile, and the end of its segment
  bool more = true;
  RowScales<kKeys> scales;

  __device__ __forceinline__ Ring(const DecodeParams& p, T* slots, State* state, float* row_scales, int team,
                                  bool is_first)
      : p(p), slots(slots), state(state), row_scales(row_scales), team(team), is_first(is_first) {}

  // At the block's first segment.
  __device__ __forceinline__ void start(const KeyCursor<kKeys>& cursor) {
    at = cursor.tile + team, stop = cursor.stop;
    save(cursor);
    find();
  }
  __device__ __forceinline__ void save(const KeyCursor<kKeys>& cursor) {
    __syncwarp();  // all lanes have read what this overwrites
    if (threadIdx.x % 32 == 0) {
      put_shared(&state->cursor, cursor);
      put_shared(&state->segment, LoadSegment(p, cursor, kValueDim, sizeof(T)));
    }
    __syncwarp();  // and now read it
  }
  // Begins to look up the pages of the next tile.
  __device__ __forceinline__ void find() {
    if (more && at >= stop) {
      KeyCursor<kKeys> cursor = get_shared(&state->cursor);
      do {
        cursor.next_segment(p);
        at = cursor.tile + team;
        more = cursor.left > 0;
      } while (more && at >= cursor.stop);
      stop = cursor.stop;
      if (more) save(cursor);
    }
    if (more) keys.look_up(p, &state->segment, at * kKeys);
  }

  __device__ __forceinline__ KTile k_tile(int slot) const { return {slots + slot * kSlot}; }
  __device__ __forceinline__ VTile v_tile(int slot) const {
    return {slots + slot * kSlot + (p.values_in_keys ? 0 : kKeys * kDim)};
  }
  static __device__ __forceinline__ int before(int slot) { return slot == 0 ? kStages - 1 : slot - 1; }
  static __device__ __forceinline__ int after(int slot) { return slot == kStages - 1 ? 0 : slot + 1; }
  // Of caches of 8 bits: the bytes of a slot, at its end.
  __device__ __forceinline__ unsigned char* bytes(int slot) const {
    return reinterpret_cast<unsigned char*>(slots + (slot + 1) * kSlot) - kSlot;
  }

  // The next tile -> slot.
  __device__ __forceinline__ void load(int slot) {
    if (is_first) scales.put(row_scales + kScales * before(slot));  // of the last load
    if (more) {
      const LoadSegment* of = &state->segment;
      const int first = at * kKeys;
      const Bits exist = keys.exist(ptx::ld_shared(&of->begin), ptx::ld_shared(&of->end), first);
      if (threadIdx.x % 32 == 0) ptx::st_shared(state->exists + slot, exist);
      if (p.is_async && p.cache_kind != kCacheOfT) {
        load_bytes<kThreads, kKeys, kDim>(bytes(slot), ptx::ld_shared(&of->k.base), p.k_stride, p.head_dim, keys,
                                          exist);
        if constexpr (kValueDim > 0) {
          load_bytes<kThreads, kKeys, kValueDim>(bytes(slot) + kKeys * kDim, ptx::ld_shared(&of->v.base), p.v_stride,
                                                 ptx::ld_shared(&of->value_columns), keys, exist);
        }
        if (is_first) scales.load(p, of, keys, exist);
      } else if (p.is_async) {
        load_chunks<kThreads>(p, k_tile(slot), VTile{slots + slot * kSlot + kKeys * kDim}, of, keys, first, exist);
      } else {
        const int fresh = ptx::ld_shared(&of->old) - first;  // row of the first new key
        load_elements<kThreads>(p, k_tile(slot), &of->k, p.k_stride, p.k_new_stride, p.k_scale_stride, p.head_dim, keys,
                                fresh, exist);
        if (kValueDim > 0 && !p.values_in_keys) {
          load_elements<kThreads>(p, v_tile(slot), &of->v, p.v_stride, p.v_new_stride, p.v_scale_stride,
                                  ptx::ld_shared(&of->value_columns), keys, fresh, exist);
        }
      }
      at += kTeams;
      find();
    }
    ptx::cp_async_commit();  // one group per tile, empty at the end, so that waits can count them
  }

  // Bytes that have landed -> T, by kTeamThreads threads; their barrier.
  template <int kTeamThreads, class Barrier>
  __device__ __forceinline__ void convert(int slot, Barrier barrier) const {
    if (!p.is_async || p.cache_kind == kCacheOfT) return;
    const float* of_rows = row_scales + kScales * slot;
    convert_rows<kTeamThreads>(p, k_tile(slot), bytes(slot), p.k_scale != nullptr, of_rows, barrier);
    if constexpr (kValueDim > 0) {
      if (!p.values_in_keys) {
        convert_rows<kTeamThreads>(p, v_tile(slot), bytes(slot) + kKeys * kDim, p.v_scale != nullptr, of_rows + kKeys,
                                   barrier);
      }
    }
    barrier();  // the tile, before any warp multiplies with it
  }
};

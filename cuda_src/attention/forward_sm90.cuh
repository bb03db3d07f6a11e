// softmax(scale Q K^T) V on Hopper's tensor cores: FlashAttention-3, arXiv:2407.08608, algorithms 1 and 2.
//
//   producer, one warp:       for each block of rows: Q, and each tile of keys that a row sees: K, V -> shared memory
//   consumers, 64 rows each:  S = Q K0^T;  P = softmax of S so far
//                             for each further tile j:
//                               S = Q Kj^T;  O += P V(j-1)     (the tensor cores, asynchronously)
//                               P' = softmax of S so far       (while O is in flight)
//                               O = O exp(m - m'), where m grew much;  P = P'
//                             O += P V(last);  out = O / l;  lse = m + log l
//
// Blocks are persistent: each computes one block of rows per round. A row is a query of one of 2^pack_log2 heads, which
// lie side by side. Masks touch only tiles that have an edge. kOwnOut: `out` has shared memory of its own, so that the
// next Q can come early; else it takes the place of Q. kPingPong: warpgroups start their products in turn
// (section 3.1), so that the softmax of one runs under the products of another. Tiles: of a block mask those that it
// lists are loaded, and no others; what some row does not see of one is found while the tensor cores are busy. NaN in K
// or V that no query sees stays out.
#pragma once

#include <attention/pipeline_sm90.cuh>
#include <attention/products_sm90.cuh>
#include <attention/softmax_sm90.cuh>
#include <primitives/vector.cuh>
#include <primitives/warp.cuh>
#include <ptx/elect.cuh>
#include <ptx/fence.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/smem.cuh>
#include <ptx/wgmma.cuh>

template <class T, int kWarpgroups, int kKeys, int kStages, int kDim, int kValueDim, bool kOwnOut, bool kPingPong,
          bool kModified, class Tiles, class Score>
__global__ void __launch_bounds__(128 * (kWarpgroups + 1), 1)
    attention_forward_sm90(const __grid_constant__ AttentionSm90Params<typename Tiles::Params> params) {
  using Smem = AttentionSmem<T, kWarpgroups, kKeys, kStages, kDim, kValueDim, kOwnOut>;
  using Base = ScoreBase<float>;
  constexpr int kRows = Smem::kRows;
  // 64 K registers: what the producer does not need is for the consumers. Above them ptxas would spill.
  constexpr int kProducerRegisters = Tiles::kListed ? 40 : kWarpgroups == 2 ? 24 : 32;
  constexpr int kConsumerRegisters = Tiles::kListed ? 232 : kWarpgroups == 2 ? 240 : 160;
  constexpr int kPingPongBarrier = 1, kGroupBarrier = 1 + kWarpgroups, kClearBarrier = 1 + 2 * kWarpgroups;

  const AttentionParams& attention = Tiles::attention(params.attention);
  const Smem smem{ptx::dynamic_smem<unsigned char, 1024>()};
  typename Smem::Barriers& barriers = smem.barriers();
  const int warp = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0),
            lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x == 0) smem.init_barriers();
  __syncthreads();  // the barriers are initialised before any warp uses them

  const int queries = kRows >> params.pack_log2;
  if (warp < 4) {
    ptx::setmaxnreg_dec<kProducerRegisters>();
    if (warp == 0) load_work<Tiles>(params, smem);
    return;
  }

  ptx::setmaxnreg_inc<kConsumerRegisters>();
  const int group = warp / 4 - 1;
  const bool leads = warp % 4 == 0;             // its group: one of its threads does what one thread has to do
  const int row0 = 16 * (warp % 4) + lane / 4;  // of the group's 64, of elements 0, 1, 4, 5 …; the others are 8 further
  const int column0 = lane % 4 * 2;
  unsigned int tile = 0;  // of K and of V
  int q_parity = 0, unseen_parity = 0;
  const auto slot = [](unsigned int tile) { return Smem::slot(tile); };
  const auto await = [&](unsigned long long* full, unsigned int tile) {
    ptx::mbarrier_wait(&full[slot(tile)], Smem::parity(tile));
  };
  const auto release = [&](unsigned long long& free) {  // for this warp
    if (lane == 0) ptx::mbarrier_arrive(&free);
  };
  const auto ping_pong_next = [&] {  // the next warpgroup may start its products
    if constexpr (kPingPong) ptx::named_barrier_arrive(kPingPongBarrier + (group + 1) % kWarpgroups, 256);
  };
  if (kPingPong && group == kWarpgroups - 1) ping_pong_next();  // the first group goes first

  for (int round = 0; round < params.schedule.rounds; ++round) {
    QueryBlock block;
    if (!find_work<Tiles, kRows>(params, round, block)) continue;
    const int batch = attention.cu_seqlens_q != nullptr ? 0 : block.batch;  // of q, k, v, out and lse
    const int q_start = static_cast<int>(block.q_start) + block.first;
    const QueryBlock::Keys keys = block.keys<kKeys>(queries);
    const Tiles tiles(params.attention, block, keys, kKeys);
    // In the last of all tiles no query sees the keys from here on; beyond k there are zeros.
    const int seen = block.high(block.q_len - 1), last_key = keys.first + (keys.tiles - 1) * kKeys;
    const int unseen_from = !Tiles::kListed && block.k_start + seen < attention.k_rows ? seen - last_key : kKeys;
    const int pack_log2 = Tiles::kListed ? 0 : params.pack_log2;  // each head has its list
    const LaneRows rows = LaneRows::of<kModified>(attention, block, pack_log2, 64 * group + row0);
    const float scale = static_cast<float>(attention.scale), softcap = static_cast<float>(attention.softcap);
    const float fold = Base::kUnit * (kModified ? 1.0f : scale);

    float o[kValueDim / 2] = {};
    float s[kKeys / 2];
    unsigned int p[kKeys / 16][4];
    OnlineSoftmax online;

    // Rows of V that no query sees, which may hold NaN, become 0. Every warp of the consumers calls it.
    const auto publish_zeros = [&] {
      ptx::fence_proxy_async();                                   // the zeros, before wgmma reads them
      ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // those of every warp
    };
    const auto clear_values = [&](int stage, int from, int to) {
      clear_rows(smem.v(stage), from, to, static_cast<int>(threadIdx.x) - 128, 128 * kWarpgroups);
      publish_zeros();
    };
    // With a block mask, and found while S is in flight: where the tile begins, and which keys of it the lane's rows
    // see, if some row does not see all.
    int key;
    bool hides = false;
    VisibleKeys<kKeys> visible;
    constexpr int kHeld = kValueDim / 2 + kKeys / 2 + kKeys / 4;  // registers of O, S and P
    constexpr int kTogether = !Tiles::kExpression ? 8 : kHeld < 160 ? 2 : 1;
    const auto look = [&](int j) {
      key = tiles.key(j);
      if constexpr (Tiles::kListed) {
        const bool partial = tiles.is_partial(j);
        hides = partial || key < keys.all_begin || key + kKeys > keys.all_end;
        if (!hides) return;
        const ScoreRule<false, NoBias, true, float> rule(attention, block, block.head);
        visible.template find<kTogether>(tiles, rule, rows, partial, key + column0);
        const unsigned int any = visible.of_warp();
        if (lane < 4) ptx::st_shared(smem.seen() + 4 * (warp - 4) + lane, any);
      }
    };
    // Rows of V that no query of the block sees become 0, as above.
    const auto clear_hidden = [&] {
      if (!hides) return;
      ptx::named_barrier_sync(kClearBarrier, 128 * kWarpgroups);  // every warp's part of `seen`
      unsigned int seen = 0;                                      // of the columns of lane % 4
#pragma unroll
      for (int w = 0; w < 4 * kWarpgroups; ++w) seen |= ptx::ld_shared(smem.seen() + 4 * w + lane % 4);
      await(barriers.v_full, tile);  // V has landed early
      const typename Smem::VTile v = smem.v(slot(tile));
      for (int n = warp - 4; n < kKeys / 4; n += 4 * kWarpgroups) {
        if ((seen >> n & 1) != 0) continue;
        for (int i = lane / 4; i < kValueDim / 8; i += 8) {
          ptx::st_shared(reinterpret_cast<uint4*>(v.chunk(8 * (n / 2) + column0 + n % 2, i)), uint4{});
        }
      }
      publish_zeros();
    };
    const auto softmax = [&] {  // P' from S; whether O is to be rescaled
      if constexpr (kModified) modify_scores(s, attention, block, rows, scale, softcap, key, column0);
      if constexpr (!kIsSame<Score, NoScore>) {
        apply_score<Score>(s, attention, block, rows, key, column0, keys.end);
      }
      if constexpr (Tiles::kListed) {
        if (hides) visible.hide(s);
      } else {
        if (key < keys.all_begin) mask_low(s, rows, key, column0);  // a tile with an edge
        if (key + kKeys > keys.all_end) mask_high(s, rows, key, column0);
      }
      return online.step(s, fold);
    };
    const auto convert = [&] {  // P = P'
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) p[i][j] = ptx::cvt_rn_x2<T>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
      }
    };

    ptx::mbarrier_wait(&barriers.q_full[group], q_parity);  // Q has landed
    q_parity ^= 1;
    if (tiles.begin < tiles.end) {
      await(barriers.k_full, tile);                         // K has landed
      ptx::wgmma_fence();                                   // hands S to the tensor cores
      start_product(s, smem.q(group), smem.k(slot(tile)));  // S = Q K^T
      look(tiles.begin);
      ptx::wgmma_wait<0>();  // S is complete, and K is read
      release(barriers.k_free[slot(tile)]);
      softmax();
      convert();
      if constexpr (Tiles::kListed) {
        clear_hidden();
      } else if (keys.unseen > 0) {
        ptx::mbarrier_wait(&barriers.v_unseen, unseen_parity);  // V has landed
        unseen_parity ^= 1;
        clear_values(slot(tile), 0, keys.unseen);
      }
      if (tiles.begin + 1 < tiles.end) await(barriers.k_full, tile + 1);  // the next K has landed
      for (int j = tiles.begin + 1; j < tiles.end; ++j) {
        const unsigned int last = tile++;
        // Waits until the warpgroup before has started its products.
        if constexpr (kPingPong) ptx::named_barrier_sync(kPingPongBarrier + group, 256);
        ptx::wgmma_fence();                                   // hands S, P and O to the tensor cores
        start_product(s, smem.q(group), smem.k(slot(tile)));  // S = Q K^T
        if (!hides) await(barriers.v_full, last);             // V has landed; a phase is waited for once
        start_sum(o, p, smem.v(slot(last)));                  // O += P V
        ping_pong_next();
        look(j);
        ptx::wgmma_wait<1>();  // S is complete, and K is read
        release(barriers.k_free[slot(tile)]);
        const bool grew = softmax();
        if (j + 1 < tiles.end) {
          // Waits for the next K here. The fake dependence on l, which is never negative, keeps ptxas from sinking the
          // softmax below the wait for O, where nothing would overlap it.
          const int never = online.l[0] + online.l[1] < 0 ? 1 : 0;
          ptx::mbarrier_wait(&barriers.k_full[slot(tile + 1)], Smem::parity(tile + 1) ^ never);
        }
        ptx::wgmma_wait<0>();  // O is complete, and P and V are read
        release(barriers.v_free[slot(last)]);
        if (grew) {  // O = O exp(m - m')
#pragma unroll
          for (int r = 0; r < kValueDim / 2; ++r) o[r] *= online.rescale[row_half(r)];
        }
        convert();
        if constexpr (Tiles::kListed) clear_hidden();
      }
    }
    if constexpr (kOwnOut) {
      __syncwarp();  // every lane has seen Q land, also where it saw no tile: the next Q must not land before
      release(barriers.q_free[group]);
    }
    if (tiles.begin < tiles.end) {
      if (!hides) await(barriers.v_full, tile);  // V has landed
      if (unseen_from < kKeys) clear_values(slot(tile), unseen_from, kKeys);
      ptx::wgmma_fence();                   // hands P and O to the tensor cores
      start_sum(o, p, smem.v(slot(tile)));  // O += P V
      ptx::wgmma_wait<0>();                 // O is complete, and V is read
      release(barriers.v_free[slot(tile)]);
      ++tile;
    }

    bool nothing[2];
    float factor[2];  // of O
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = rows.query[half], head = rows.head[half];
      float total = group_sum<4>(online.l[half]), weight = 1, m = online.shift[half].log_unit(kModified ? 1 : scale);
      if (attention.sinks != nullptr) {
        const float sink = ptx::ld_global(static_cast<const float*>(attention.sinks) + head);
        weight = online.shift[half].join(sink, m, total);
      }
      const bool padding = query >= block.q_len;
      if (attention.lse != nullptr && lane % 4 == 0 && query < block.rows) {
        const float infinity = Limits<float>::infinity();
        const float lse = (m == -infinity ? 0 : m) + log_natural(total);
        ptx::st_global(static_cast<float*>(attention.lse) + batch * attention.lse_stride[0] +
                           head * attention.lse_stride[1] + (block.q_start + query) * attention.lse_stride[2],
                       padding ? -infinity : lse);
      }
      nothing[half] = padding || total == 0;
      factor[half] = weight * ptx::rcp_approx(total);
    }

    if (kOwnOut && leads && ptx::elect_one()) ptx::cp_async_bulk_wait_read<0>();  // the last `out` has left
    ptx::named_barrier_sync(kGroupBarrier + group, 128);  // all warps are done with what is in the place of `out`
    const typename Smem::OutTile out = smem.out(group);
    unsigned char* const to = out.chunk(16 * (warp % 4) + lane % 16, lane / 16);
#pragma unroll
    for (int i = 0; i < kValueDim / 16; ++i) {
      unsigned int words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float scaled[2] = {o[8 * i + 2 * j] * factor[j % 2], o[8 * i + 2 * j + 1] * factor[j % 2]};
        words[j] = ptx::cvt_rn_x2<T>(nothing[j % 2] ? 0 : scaled[0], nothing[j % 2] ? 0 : scaled[1]);
      }
      ptx::stmatrix_x4(out.beyond(to, 2 * i), words);
    }
    // TMA stores whole chunks of 16 bytes, and whole boxes: where a row ends within a chunk, or a sequence within a
    // box, it would overwrite what follows.
    const bool whole = !attention.out_is_float && attention.value_dim % 8 == 0 &&
                       (attention.cu_seqlens_q == nullptr || block.first + queries <= block.rows);
    if (attention.out_is_float) {  // from the accumulators: a quad of lanes has whole sectors
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = row_of<float>(attention.out, attention.out_stride, batch, rows.head[half],
                                  block.q_start + rows.query[half]);
        const int left = rows.query[half] < block.rows ? attention.value_dim : 0;
#pragma unroll
        for (int d = 0; d < kValueDim / 8; ++d) {
          const int column = column0 + 8 * d;
          Fragment<float, 2> sums{o[4 * d + 2 * half] * factor[half], o[4 * d + 2 * half + 1] * factor[half]};
          if (nothing[half]) sums = {};
          store_left(to + column * attention.out_stride[3], sums, left - column, attention.out_stride[3],
                     attention.out_is_vector);
        }
      }
    } else if (!whole) {
      __syncwarp();  // the rows of this warp
      constexpr int kChunks = kValueDim / 8;
      for (int i = lane; i < 16 * kChunks; i += 32) {
        const int row = 16 * (warp % 4) + i / kChunks, column = i % kChunks * 8;
        const int in_block = 64 * group + row, pack_mask = (1 << params.pack_log2) - 1;
        const int to_head = (block.head << params.pack_log2) + (in_block & pack_mask);
        const int to_query = block.first + (in_block >> params.pack_log2);
        if (to_query >= block.rows || column >= attention.value_dim) continue;
        using Chunk = Fragment<T, 8>;
        const Chunk values = ptx::ld_shared(reinterpret_cast<const Chunk*>(out.chunk(row, column / 8)));
        T* ptr = row_of<T>(attention.out, attention.out_stride, batch, to_head, block.q_start + to_query) + column;
        store_left(ptr, values, attention.value_dim - column, 1, true);
      }
    }
    ptx::fence_proxy_async();                             // `out` is written, before TMA reads it or Q replaces it
    ptx::named_barrier_sync(kGroupBarrier + group, 128);  // and that by every warp
    if (leads && ptx::elect_one()) {
      if (whole) smem.out(group).store(params.out, 0, q_start + (64 * group >> params.pack_log2), block.head, batch);
      ptx::cp_async_bulk_commit();
      if (!kOwnOut) {
        ptx::cp_async_bulk_wait_read<0>();  // `out` has left: Q may come
        ptx::mbarrier_arrive(&barriers.q_free[group]);
      }
    }
  }
  if (leads && ptx::elect_one()) ptx::cp_async_bulk_wait_read<0>();  // before shared memory is given back
}

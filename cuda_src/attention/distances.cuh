// Where sums of gradients of scores by the distance of query and key lie. Of query i and key j it is i + offset - j.
//
// Tiles of 2^log2 queries and as many keys that are equally far from each other are a diagonal of tiles. With
// rows = 2^log2 it has 2 rows - 1 distances, and a slot for their sums. Tiles of queries begin at multiples of rows,
// those of keys so that one diagonal is `rows` distances from the next: a distance lies in one or in two of them.
#pragma once

#include <attention/backward.cuh>

struct Diagonal {
  QueryBlock block;     // all queries of the sequence and head
  int number;           // of the diagonal
  long long least;      // of the distances of the sequence
  long long distances;  // of the sequence
  long long shift;      // with a tile of queries from i on go keys from i + shift - number 2^log2 on
};

// The slots of sequence b begin here; it has at most (queries + keys) / 2^log2 + 2 of them.
__device__ __forceinline__ long long first_slot(const AttentionParams& a, int log2, int b) {
  const long long tokens =
      sequence_of(a.cu_seqlens_q, a.q_rows, b).start + sequence_of(a.cu_seqlens_k, a.k_rows, b).start;
  return (tokens >> log2) + 2LL * b;
}

// The diagonal of a slot. False: there is none. Every thread may ask for its own.
__device__ __forceinline__ bool find_diagonal(const AttentionParams& a, int slots, int log2, unsigned int index,
                                              Diagonal& found) {
  const unsigned int unit = index / static_cast<unsigned int>(slots);
  QueryBlock& block = found.block;
  found.number = static_cast<int>(index % static_cast<unsigned int>(slots));
  block.head = static_cast<int>(unit % static_cast<unsigned int>(a.heads));
  block.batch = static_cast<int>(unit / static_cast<unsigned int>(a.heads));
  if (a.cu_seqlens_q != nullptr) {
    block.batch = 0;  // the last sequence whose slots begin here or before
    for (int above = a.batch; above - block.batch > 1;) {
      const int middle = (block.batch + above) / 2;
      (first_slot(a, log2, middle) <= found.number ? block.batch : above) = middle;
    }
    found.number -= static_cast<int>(first_slot(a, log2, block.batch));
  }
  find_sequence(a, block);
  const long long offset = block.to - a.right - 1;
  // Of all sequences of a dense batch the least distance is the same, unless each has an offset of its own.
  found.shift = a.bottom_right && a.q_offset == nullptr ? offset + block.rows - 1 : block.k_rows - 1;
  found.least = offset - found.shift;
  found.distances = static_cast<long long>(block.rows) + block.k_rows - 1;
  const bool any = block.rows > 0 && block.k_rows > 0;
  return any && found.number >= 0 && found.number <= (found.distances + (1 << log2) - 2) >> log2;
}

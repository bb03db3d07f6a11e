// Fragments of kCount consecutive elements of a row, moved with one access where the row allows it.
//
// Kernels lay fragments over a row from the last address at or before its start that is aligned to a whole fragment, so
// every fragment inside the row is one aligned access, whatever the row's own alignment (V = 50257, sliced views); the
// first and the last, which may stick out of the row, move element by element.
#pragma once

#include <primitives/numeric.cuh>
#include <ptx/memory.cuh>

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Fragment {
  T element[kCount];
};

template <bool kFirst, class A, class B>
struct Select {
  using Type = A;
};
template <class A, class B>
struct Select<false, A, B> {
  using Type = B;
};

// A fragment as it was loaded. Narrow elements stay packed in words until they are used: unpacking waits for the load,
// which would stall the next one.
template <class T, int kCount>
struct Packed {
  static constexpr int kPerWord = sizeof(T) < 4 && kCount * sizeof(T) % 4 == 0 ? 4 / sizeof(T) : 1;
  using Word = typename Select<(kPerWord > 1), unsigned int, T>::Type;
  using Bits = typename Select<sizeof(T) == 1, unsigned char, unsigned short>::Type;
  Fragment<Word, kCount / kPerWord> words;

  __device__ __forceinline__ T element(int i) const {
    if constexpr (kPerWord == 1) {
      return words.element[i];
    } else {
      const Bits bits = static_cast<Bits>(words.element[i / kPerWord] >> 8 * sizeof(T) * (i % kPerWord));
      return reinterpret_cast<const T&>(bits);
    }
  }

  // Sets elements in the order of i.
  __device__ __forceinline__ void set(int i, T value) {
    if constexpr (kPerWord == 1) {
      words.element[i] = value;
    } else {
      const unsigned int bits = reinterpret_cast<const Bits&>(value) << 8 * sizeof(T) * (i % kPerWord);
      words.element[i / kPerWord] = i % kPerWord == 0 ? bits : words.element[i / kPerWord] | bits;
    }
  }
};

// Elements from the fragment boundary at or before `row` to `row` itself.
template <class T, int kCount>
__device__ __forceinline__ int elements_past_boundary(const T* row) {
  return static_cast<int>(reinterpret_cast<unsigned long long>(row) % (sizeof(T) * kCount) / sizeof(T));
}

// Loads columns col … col + kCount - 1 of row[begin, end), zeros outside. kStreaming: nothing reads these bytes again.
// aligned: whether `col` is on a fragment boundary of this row.
template <bool kStreaming, int kCount, class T, class Index>
__device__ __forceinline__ Packed<T, kCount> load_fragment(const T* row, Index col, Index begin, Index end,
                                                           bool aligned = true) {
  Packed<T, kCount> packed;
  const T* ptr = row + col;
  if (col >= begin && col + kCount <= end && aligned) {
    const auto* vector_ptr = reinterpret_cast<const decltype(packed.words)*>(ptr);
    packed.words = kStreaming ? ptx::ld_global_streaming(vector_ptr) : ptx::ld_global(vector_ptr);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      packed.set(i, col + i >= begin && col + i < end ? ptx::ld_global(ptr + i) : T());
    }
  }
  return packed;
}

// Bytes shift … shift + n - 1 of the 2n bytes (low, high), n the size of a fragment, as a fragment.
template <class Vector>
__device__ __forceinline__ Vector funnel(Vector low, Vector high, int shift) {
  constexpr int kWords = sizeof(Vector) / 4;
  unsigned int word[2 * kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    word[i] = reinterpret_cast<const unsigned int*>(&low)[i];
    word[kWords + i] = reinterpret_cast<const unsigned int*>(&high)[i];
  }
  // Shift by 8, 4 and 2 bytes as the bits of `shift` say: registers cannot be indexed at run time.
#pragma unroll
  for (int step = kWords / 2; step > 0; step /= 2) {
#pragma unroll
    for (int i = 0; i + step < 2 * kWords; ++i) word[i] = shift & (4 * step) ? word[i + step] : word[i];
  }
  Vector result;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    reinterpret_cast<unsigned int*>(&result)[i] = __funnelshift_r(word[i], word[i + 1], 8 * (shift & 2));
  }
  return result;
}

template <class Vector>
__device__ __forceinline__ Vector shuffle_up(Vector vector) {
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Vector) / 4); ++i) {
    unsigned int& word = reinterpret_cast<unsigned int*>(&vector)[i];
    word = __shfl_up_sync(0xffffffff, word, 1);
  }
  return vector;
}

// Stores elements `first` … kCount - 1 of a fragment at column col, as far as they lie inside row[begin, end).
template <int kCount, class T, class Index>
__device__ __forceinline__ void store_elements(T* row, Index col, Index begin, Index end, Fragment<T, kCount> vector,
                                               int first) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i >= first && col + i >= begin && col + i < end) ptx::st_global_streaming(row + col + i, vector.element[i]);
  }
}

// Stores columns col … col + kCount - 1 of row[begin, end). `col` puts *inputs* on fragment boundaries; where the
// output row is aligned otherwise (a slice of a padded matrix written to a packed one), lanes of a warp that own
// consecutive fragments exchange elements so that the stores are whole aligned fragments too. kWholeWarps: all 32 lanes
// call this together and lane i + 1 owns the fragment after lane i's; else unaligned rows are stored element by
// element.
template <bool kWholeWarps, int kCount, class T, class Acc, class Index>
__device__ __forceinline__ void store_fragment(T* row, Index col, Index begin, Index end, const Acc (&value)[kCount]) {
  using Vector = Fragment<T, kCount>;
  Vector vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.element[i] = from_acc<T>(value[i]);

  const int past = elements_past_boundary<T, kCount>(row + col);  // the same for every fragment of the row
  int first = 0;
  if constexpr (kWholeWarps && kCount > 1) {
    if (past != 0) {
      // This lane stores the aligned fragment that starts `past` elements before its own, the head of which the lane
      // below holds; lane 0 has no lane below and lane 31 none above, so these ends are stored by element.
      const Vector below = shuffle_up(vector);
      if (threadIdx.x % 32 == 31) store_elements<kCount>(row, col, begin, end, vector, kCount - past);
      vector = funnel(below, vector, static_cast<int>(sizeof(Vector)) - past * static_cast<int>(sizeof(T)));
      col -= past;
      first = threadIdx.x % 32 == 0 ? past : 0;
    }
  }
  const bool aligned = kWholeWarps || past == 0;
  if (aligned && first == 0 && col >= begin && col + kCount <= end) {
    ptx::st_global_streaming(reinterpret_cast<Vector*>(row + col), vector);
  } else {
    store_elements<kCount>(row, col, begin, end, vector, first);
  }
}

// The first `left` elements of a fragment, `stride` apart. vector: elements are neighbours and the address is aligned,
// so that a whole fragment is one access.
template <class T, int kCount>
__device__ __forceinline__ void store_left(T* ptr, const Fragment<T, kCount>& values, int left, long long stride,
                                           bool vector) {
  if (vector && left >= kCount) {
    ptx::st_global(reinterpret_cast<Fragment<T, kCount>*>(ptr), values);
  } else {
#pragma unroll
    for (int e = 0; e < kCount; ++e) {
      if (e < left) ptx::st_global(ptr + e * stride, values.element[e]);
    }
  }
}

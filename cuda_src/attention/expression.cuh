// The operations of score expressions (cuattn/_arrays/expression.py), by the names of NumPy's functions: on long long,
// which wraps; on float or double, each rounded by itself, as NumPy's are; on bool.
#pragma once

#include <attention/scores.cuh>

namespace expression {

using Int = long long;
using Bits = unsigned long long;  // whose arithmetic wraps

__device__ __forceinline__ Int add(Int a, Int b) {
  return static_cast<Int>(static_cast<Bits>(a) + static_cast<Bits>(b));
}
__device__ __forceinline__ Int subtract(Int a, Int b) {
  return static_cast<Int>(static_cast<Bits>(a) - static_cast<Bits>(b));
}
__device__ __forceinline__ Int multiply(Int a, Int b) {
  return static_cast<Int>(static_cast<Bits>(a) * static_cast<Bits>(b));
}
__device__ __forceinline__ Int negative(Int a) { return subtract(0, a); }
__device__ __forceinline__ Int absolute(Int a) { return a < 0 ? negative(a) : a; }

// Rounded down, and what is left, of the sign of b; 0 where b = 0. C++ does not divide the least number by -1.
__device__ __forceinline__ Int floor_divide(Int a, Int b) {
  if (b == 0) return 0;
  if (b == -1) return negative(a);
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
__device__ __forceinline__ Int remainder(Int a, Int b) {
  if (b == 0 || b == -1) return 0;
  const Int left = a % b;
  return left != 0 && (left < 0) != (b < 0) ? left + b : left;
}

template <class Acc>
__device__ __forceinline__ Acc add(Acc a, Acc b) {
  return a + b;
}
template <class Acc>
__device__ __forceinline__ Acc subtract(Acc a, Acc b) {
  return a - b;
}
template <class Acc>
__device__ __forceinline__ Acc multiply(Acc a, Acc b) {
  return mul_rn(a, b);
}
// A product of derivatives, 0 if one of them is, whatever the other one is.
template <class Acc>
__device__ __forceinline__ Acc chained(Acc a, Acc b) {
  return a == 0 || b == 0 ? Acc(0) : mul_rn(a, b);
}
template <class Acc>
__device__ __forceinline__ Acc divide(Acc a, Acc b) {
  return a / b;
}
template <class Acc>
__device__ __forceinline__ Acc negative(Acc a) {
  return -a;
}
template <class Acc>
__device__ __forceinline__ Acc absolute(Acc a) {
  return fabs(a);
}
template <class Acc>
__device__ __forceinline__ Acc exp(Acc a) {
  return ::exp(a);
}
template <class Acc>
__device__ __forceinline__ Acc log(Acc a) {
  return ::log(a);
}
template <class Acc>
__device__ __forceinline__ Acc tanh(Acc a) {
  return ::tanh(a);
}
template <class Acc>
__device__ __forceinline__ Acc sqrt(Acc a) {
  return ::sqrt(a);
}

// NaN wins.
template <class T>
__device__ __forceinline__ T minimum(T a, T b) {
  return a <= b || a != a ? a : b;
}
template <class T>
__device__ __forceinline__ T maximum(T a, T b) {
  return a >= b || a != a ? a : b;
}

template <class T>
__device__ __forceinline__ bool less(T a, T b) {
  return a < b;
}
template <class T>
__device__ __forceinline__ bool less_equal(T a, T b) {
  return a <= b;
}
template <class T>
__device__ __forceinline__ bool greater(T a, T b) {
  return a > b;
}
template <class T>
__device__ __forceinline__ bool greater_equal(T a, T b) {
  return a >= b;
}
template <class T>
__device__ __forceinline__ bool equal(T a, T b) {
  return a == b;
}
template <class T>
__device__ __forceinline__ bool not_equal(T a, T b) {
  return a != b;
}

template <class T>
__device__ __forceinline__ T bitwise_and(T a, T b) {
  return a & b;
}
template <class T>
__device__ __forceinline__ T bitwise_or(T a, T b) {
  return a | b;
}
__device__ __forceinline__ Int invert(Int a) { return ~a; }
__device__ __forceinline__ bool invert(bool a) { return !a; }
template <class T>
__device__ __forceinline__ T where(bool condition, T a, T b) {
  return condition ? a : b;
}

// An element of an array, whatever the indices: each is moved to the nearest one that there is.
template <class T, int kArray, class... Index>
__device__ __forceinline__ T element(const ScoreArrays& arrays, Index... index) {
  constexpr int kIndices = sizeof...(Index);
  const Int at[kIndices + 1] = {index..., 0};
  Int offset = 0;
#pragma unroll
  for (int i = 0; i < kIndices; ++i) {
    offset += clamp_index(at[i], 0, arrays.size[kArray][i] - 1) * arrays.stride[kArray][i];
  }
  return ptx::ld_global(static_cast<const T*>(arrays.array[kArray]) + offset);
}

// Where `element` looks, in C order.
template <int kArray, class... Index>
__device__ __forceinline__ Int place(const ScoreArrays& arrays, Index... index) {
  constexpr int kIndices = sizeof...(Index);
  const Int at[kIndices + 1] = {index..., 0};
  Int found = 0;
#pragma unroll
  for (int i = 0; i < kIndices; ++i) {
    found = found * arrays.size[kArray][i] + clamp_index(at[i], 0, arrays.size[kArray][i] - 1);
  }
  return found;
}

}  // namespace expression

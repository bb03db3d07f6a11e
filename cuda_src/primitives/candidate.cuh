// What a selection orders: an element's value as an unsigned key, then its index.
//
// A larger key is better, and 0 is that of NaN: numbers keep their order, -0 and +0 are equal. Of equal keys the lower
// index is better, so that no two elements are equal and the result does not depend on the order they are looked at.
#pragma once

#include <primitives/numeric.cuh>
#include <ptx/math.cuh>

// Keys of `sign` * value, sign 1 or -1: the largest elements are the best, or the smallest.
__device__ __forceinline__ unsigned int sort_key(float value, float sign) {
  const int bits = __float_as_int(ptx::fma_rn(value, sign, 0.0f));  // -0 + 0 = +0, a NaN is 0x7fffffff
  return static_cast<unsigned int>(bits ^ (bits >> 31 & 0x7fffffff)) + 0x80000001u;
}
__device__ __forceinline__ unsigned long long sort_key(double value, double sign) {
  const long long bits = __double_as_longlong(ptx::fma_rn(value, sign, 0.0));
  const unsigned long long ordered = static_cast<unsigned long long>(bits ^ (bits >> 63 & 0x7fffffffffffffffLL));
  return value == value ? ordered + 0x8000000000000001ULL : 0;
}
__device__ __forceinline__ unsigned int sort_key(unsigned int value, unsigned int sign) {
  return sign == 1 ? value : ~value;
}
__device__ __forceinline__ unsigned int sort_key(int value, int sign) {
  return sort_key(static_cast<unsigned int>(value) ^ 0x80000000u, static_cast<unsigned int>(sign));
}
__device__ __forceinline__ unsigned long long sort_key(unsigned long long value, unsigned long long sign) {
  return sign == 1 ? value : ~value;
}
__device__ __forceinline__ unsigned long long sort_key(long long value, long long sign) {
  return sort_key(static_cast<unsigned long long>(value) ^ 0x8000000000000000ULL,
                  static_cast<unsigned long long>(sign));
}

// The value of a key; +0 for both zeros, one NaN for all.
template <class Value>
__device__ __forceinline__ Value sorted_value(unsigned long long key, Value sign) {
  if constexpr (kIsSame<Value, float>) {
    const int bits = static_cast<int>(static_cast<unsigned int>(key) - 0x80000001u);
    return ptx::fma_rn(__int_as_float(bits ^ (bits >> 31 & 0x7fffffff)), sign, 0.0f);
  } else if constexpr (kIsSame<Value, double>) {
    const long long bits = static_cast<long long>(key - 0x8000000000000001ULL);
    return ptx::fma_rn(__longlong_as_double(bits ^ (bits >> 63 & 0x7fffffffffffffffLL)), sign, 0.0);
  } else {
    constexpr bool kSigned = static_cast<Value>(-1) < Value(1);
    const Value bits = static_cast<Value>(sign == Value(1) ? key : ~key);
    return kSigned ? bits ^ static_cast<Value>(Value(1) << (8 * sizeof(Value) - 1)) : bits;
  }
}

// A 32-bit key and an index below 2^32 - 1 in one word that compares as the pair does.
struct NarrowCandidate {
  using Key = unsigned int;
  unsigned long long bits;

  static __device__ __forceinline__ NarrowCandidate make(Key key, unsigned long long index) {
    return {static_cast<unsigned long long>(key) << 32 | static_cast<unsigned int>(~index)};
  }
  static __device__ __forceinline__ NarrowCandidate none() { return {0}; }  // beats nothing
  __device__ __forceinline__ bool is_none() const { return bits == 0; }
  __device__ __forceinline__ Key key() const { return static_cast<Key>(bits >> 32); }
  __device__ __forceinline__ long long index() const { return static_cast<unsigned int>(~bits); }
  __device__ __forceinline__ bool beats(NarrowCandidate other) const { return bits > other.bits; }
  __device__ __forceinline__ void replace(bool condition, NarrowCandidate other) {
    bits = condition ? other.bits : bits;
  }
  __device__ __forceinline__ NarrowCandidate shuffle(int lane) const { return {__shfl_sync(0xffffffff, bits, lane)}; }
  __device__ __forceinline__ NarrowCandidate shuffle_xor(int mask) const {
    return {__shfl_xor_sync(0xffffffff, bits, mask)};
  }
};

// Any key and any index.
struct alignas(16) WideCandidate {
  using Key = unsigned long long;
  Key key_;
  unsigned long long complement;  // of the index

  static __device__ __forceinline__ WideCandidate make(Key key, unsigned long long index) { return {key, ~index}; }
  static __device__ __forceinline__ WideCandidate none() { return {0, 0}; }
  __device__ __forceinline__ bool is_none() const { return complement == 0; }
  __device__ __forceinline__ Key key() const { return key_; }
  __device__ __forceinline__ long long index() const { return static_cast<long long>(~complement); }
  __device__ __forceinline__ bool beats(WideCandidate other) const {
    return key_ > other.key_ || (key_ == other.key_ && complement > other.complement);
  }
  __device__ __forceinline__ void replace(bool condition, WideCandidate other) {
    key_ = condition ? other.key_ : key_;
    complement = condition ? other.complement : complement;
  }
  __device__ __forceinline__ WideCandidate shuffle(int lane) const {
    return {__shfl_sync(0xffffffff, key_, lane), __shfl_sync(0xffffffff, complement, lane)};
  }
  __device__ __forceinline__ WideCandidate shuffle_xor(int mask) const {
    return {__shfl_xor_sync(0xffffffff, key_, mask), __shfl_xor_sync(0xffffffff, complement, mask)};
  }
};

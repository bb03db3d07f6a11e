// Element types, accumulator types and the exponential: the only file that knows what a half is.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <ptx/math.cuh>

template <class A, class B>
constexpr bool kIsSame = false;
template <class A>
constexpr bool kIsSame<A, A> = true;

// A constant that a function takes by value, to choose between two bodies at compile time.
template <bool kBool>
struct Constant {
  static constexpr bool kValue = kBool;
};

// Elements to accumulators: exact but for 64-bit integers, and for float64 read into a float32 accumulator.
template <class Acc, class T>
__device__ __forceinline__ Acc to_acc(T value) {
  return static_cast<Acc>(value);
}
template <class Acc>
__device__ __forceinline__ Acc to_acc(__half value) {
  return static_cast<Acc>(__half2float(value));
}
template <class Acc>
__device__ __forceinline__ Acc to_acc(__nv_bfloat16 value) {
  return static_cast<Acc>(__bfloat162float(value));
}

// Accumulator to element, rounded once to nearest even.
template <class T, class Acc>
__device__ __forceinline__ T from_acc(Acc value) {
  constexpr bool kDouble = kIsSame<Acc, double>;
  if constexpr (kIsSame<T, __half>) {
    return kDouble ? __double2half(value) : __float2half_rn(value);
  } else if constexpr (kIsSame<T, __nv_bfloat16>) {
    return kDouble ? __double2bfloat16(value) : __float2bfloat16_rn(value);
  } else {
    return static_cast<T>(value);
  }
}

template <class Acc>
struct Limits;
template <>
struct Limits<float> {
  static __device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }
  static __device__ __forceinline__ float nan() { return __int_as_float(0x7fffffff); }
  static __device__ __forceinline__ float most() { return __int_as_float(0x7f7fffff); }  // finite
};
template <>
struct Limits<double> {
  static __device__ __forceinline__ double infinity() { return __longlong_as_double(0x7ff0000000000000LL); }
  static __device__ __forceinline__ double nan() { return __longlong_as_double(0x7fffffffffffffffLL); }
  static __device__ __forceinline__ double most() { return __longlong_as_double(0x7fefffffffffffffLL); }
};

// Larger of two. A NaN `b` gives way to the number `a` (it is kept by the sum of exponentials, see SoftmaxState).
__device__ __forceinline__ float max_number(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_number(double a, double b) { return b > a ? b : a; }

// a * b rounded by itself: the compiler fuses no addition into it.
__device__ __forceinline__ float mul_rn(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double mul_rn(double a, double b) { return __dmul_rn(a, b); }

// e^x. In float32 one multiplication and one MUFU.EX2; callers subtract the maximum first, so that x <= 0 and rounding
// x * log2(e) costs at most |x| half ulps of a result that is e^x small.
__device__ __forceinline__ float exp_natural(float x) { return ptx::exp2_approx(x * 1.4426950408889634f); }
__device__ __forceinline__ double exp_natural(double x) { return ptx::exp_f64(x); }

// e^(unit * x) in two steps, the first of which does not underflow before the result itself does: MUFU.EX2 flushes
// subnormals, so float32 takes the root and squares it. float64 has the exponential at once, and no units.
__device__ __forceinline__ float exp_root(float x, float unit) { return ptx::exp2_approx(x * (unit * 0.72134752f)); }
__device__ __forceinline__ double exp_root(double x, double) { return ptx::exp_f64(x); }
__device__ __forceinline__ float from_root(float root) { return mul_rn(root, root); }
__device__ __forceinline__ double from_root(double e) { return e; }
__device__ __forceinline__ float add_from_root(float sum, float root) { return ptx::fma_rn(root, root, sum); }
__device__ __forceinline__ double add_from_root(double sum, double e) { return sum + e; }
__device__ __forceinline__ float add_times_from_root(float sum, float factor, float root) {
  return ptx::fma_rn(root * factor, root, sum);
}
__device__ __forceinline__ double add_times_from_root(double sum, double factor, double e) {
  return ptx::fma_rn(e, factor, sum);
}
__device__ __forceinline__ float times_from_root(float factor, float root) { return mul_rn(root * factor, root); }
__device__ __forceinline__ double times_from_root(double factor, double e) { return mul_rn(e, factor); }

// `scale` as factor * unit, such that no element times `factor` overflows: unit is a power of two, 1 where |scale| <=
// 1, and then |factor| < 1 (below 2 if |scale| >= 2^127). Products with either are exact multiples of each other, so
// that differences of scores do not depend on the unit.
template <class Acc>
struct ScaleParts {
  Acc factor, unit;
};
__device__ __forceinline__ ScaleParts<float> parts_of_scale(float scale) {
  const int bits = __float_as_int(scale), exponent = bits >> 23 & 255;
  if (!(fabsf(scale) > 1) || exponent == 255) return {scale, 1.0f};
  const int power = min(exponent - 126, 127);
  return {__int_as_float((bits & 0x807fffff) | (exponent - power) << 23), __int_as_float((127 + power) << 23)};
}
template <class Acc>
__device__ __forceinline__ ScaleParts<Acc> parts_of_scale(Acc scale) {
  return {scale, Acc(1)};
}

__device__ __forceinline__ float log_natural(float x) { return logf(x); }
__device__ __forceinline__ double log_natural(double x) { return log(x); }
// log(1 + x): beyond 1 as the logarithm of a whole number, where x is one.
__device__ __forceinline__ float log1p_natural(float x) { return x < 1 ? log1pf(x) : logf(1 + x); }
__device__ __forceinline__ double log1p_natural(double x) { return x < 1 ? log1p(x) : log(1 + x); }

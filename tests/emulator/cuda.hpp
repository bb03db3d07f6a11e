// CUDA C as C++17: force-included before every kernel. Qualifiers vanish, built-in variables read the running fiber,
// and warp and block primitives call the runtime, each with its call site. No standard headers: a kernel must build
// quickly.
#pragma once

#include <device.hpp>

// `__shared__` is left undefined on purpose: shared memory comes from <ptx/smem.cuh>.
#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#ifdef EMU_PROFILE  // its count knows no function that two branches call
#define __forceinline__ inline __attribute__((always_inline))
#else  // compiles attention over a cache in half the time
#define __forceinline__ inline
#endif
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::emu::current->thread_idx)
#define blockIdx (::emu::current->block_idx)
#define blockDim (::emu::block_dim)
#define gridDim (::emu::grid_dim)
constexpr int warpSize = 32;

using size_t = decltype(sizeof(0));
using cudaStream_t = void*;

// -- the C library, declared by hand --------------------------------------------------------------

extern "C" {
void* memcpy(void*, const void*, size_t) noexcept;
void* memset(void*, int, size_t) noexcept;
int abs(int) noexcept;
#define EMU_MATH_1(name)        \
  double name(double) noexcept; \
  float name##f(float) noexcept;
#define EMU_MATH_2(name)                \
  double name(double, double) noexcept; \
  float name##f(float, float) noexcept;
EMU_MATH_1(exp)
EMU_MATH_1(exp2)
EMU_MATH_1(expm1)
EMU_MATH_1(log)
EMU_MATH_1(log2)
EMU_MATH_1(log1p)
EMU_MATH_1(tanh)
EMU_MATH_1(sqrt)
EMU_MATH_1(fabs)
EMU_MATH_1(floor)
EMU_MATH_1(ceil)
EMU_MATH_1(trunc)
EMU_MATH_1(rint)
EMU_MATH_2(fmax)
EMU_MATH_2(fmin)
EMU_MATH_2(fmod)
EMU_MATH_2(pow)
EMU_MATH_2(copysign)
double fma(double, double, double) noexcept;
float fmaf(float, float, float) noexcept;
double ldexp(double, int) noexcept;
float ldexpf(float, int) noexcept;
}

// CUDA's overloads for float.
#define EMU_OVERLOAD(name) \
  __forceinline__ float name(float x) { return name##f(x); }
EMU_OVERLOAD(exp)
EMU_OVERLOAD(exp2)
EMU_OVERLOAD(expm1)
EMU_OVERLOAD(log)
EMU_OVERLOAD(log2)
EMU_OVERLOAD(log1p)
EMU_OVERLOAD(tanh)
EMU_OVERLOAD(sqrt)
EMU_OVERLOAD(fabs)
EMU_OVERLOAD(floor)
EMU_OVERLOAD(ceil)
EMU_OVERLOAD(trunc)
EMU_OVERLOAD(rint)
#undef EMU_OVERLOAD
#undef EMU_MATH_1
#undef EMU_MATH_2

template <class T>
__forceinline__ bool isnan(T x) {
  return x != x;
}
template <class T>
__forceinline__ bool isinf(T x) {
  return __builtin_isinf(x);
}
template <class T>
__forceinline__ bool isfinite(T x) {
  return __builtin_isfinite(x);
}
__forceinline__ float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// Products that no addition is fused into, even where the compiler may contract: it cannot see through the barrier.
#if defined(__x86_64__)
#define EMU_FLOAT_REGISTER "x"
#else
#define EMU_FLOAT_REGISTER "w"
#endif
__forceinline__ float __fmul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+" EMU_FLOAT_REGISTER(product));
  return product;
}
__forceinline__ double __dmul_rn(double a, double b) {
  double product = a * b;
  asm("" : "+" EMU_FLOAT_REGISTER(product));
  return product;
}
#undef EMU_FLOAT_REGISTER

#define EMU_MIN_MAX(T)                                      \
  __forceinline__ T max(T a, T b) { return a > b ? a : b; } \
  __forceinline__ T min(T a, T b) { return a < b ? a : b; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned int)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
__forceinline__ float max(float a, float b) { return fmaxf(a, b); }
__forceinline__ float min(float a, float b) { return fminf(a, b); }
__forceinline__ double max(double a, double b) { return fmax(a, b); }
__forceinline__ double min(double a, double b) { return fmin(a, b); }

// -- vector types -----------------------------------------------------------------------------------

#define EMU_VECTOR(T, Name)                                                          \
  struct Name##1 { T x; };                                                           \
  struct alignas(2 * sizeof(T)) Name##2 { T x, y; };                                 \
  struct Name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Name##4 { T x, y, z, w; }; \
  __forceinline__ Name##2 make_##Name##2(T x, T y) { return {x, y}; }                \
  __forceinline__ Name##3 make_##Name##3(T x, T y, T z) { return {x, y, z}; }        \
  __forceinline__ Name##4 make_##Name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTOR(signed char, char)
EMU_VECTOR(unsigned char, uchar)
EMU_VECTOR(short, short)
EMU_VECTOR(unsigned short, ushort)
EMU_VECTOR(int, int)
EMU_VECTOR(unsigned int, uint)
EMU_VECTOR(long long, longlong)
EMU_VECTOR(unsigned long long, ulonglong)
EMU_VECTOR(float, float)
EMU_VECTOR(double, double)
#undef EMU_VECTOR
struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};

// -- bits ---------------------------------------------------------------------------------------------

#define EMU_BIT_CAST(name, To, From)   \
  __forceinline__ To name(From from) { \
    To to;                             \
    memcpy(&to, &from, sizeof(to));    \
    return to;                         \
  }
EMU_BIT_CAST(__int_as_float, float, int)
EMU_BIT_CAST(__float_as_int, int, float)
EMU_BIT_CAST(__uint_as_float, float, unsigned int)
EMU_BIT_CAST(__float_as_uint, unsigned int, float)
EMU_BIT_CAST(__longlong_as_double, double, long long)
EMU_BIT_CAST(__double_as_longlong, long long, double)
#undef EMU_BIT_CAST

__forceinline__ int __popc(unsigned int x) { return __builtin_popcount(x); }
__forceinline__ int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
__forceinline__ int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned int>(x)); }
__forceinline__ int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
__forceinline__ unsigned int __umulhi(unsigned int x, unsigned int y) {
  return static_cast<unsigned int>(static_cast<unsigned long long>(x) * y >> 32);
}
__forceinline__ int __ffs(int x) { return __builtin_ffs(x); }
__forceinline__ int __ffsll(long long x) { return __builtin_ffsll(x); }
__forceinline__ unsigned int __brev(unsigned int x) {
  unsigned int reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1) << (31 - i);
  return reversed;
}
__forceinline__ unsigned int __funnelshift_r(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
__forceinline__ unsigned int __funnelshift_l(unsigned int low, unsigned int high, unsigned int shift) {
  return static_cast<unsigned int>((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31) >> 32);
}
__forceinline__ unsigned int __byte_perm(unsigned int a, unsigned int b, unsigned int selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(b) << 32 | a;
  unsigned int result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned int select = selector >> (4 * i) & 15;
    unsigned int byte = static_cast<unsigned int>(bytes >> (8 * (select & 7))) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;  // the sign of the selected byte, replicated
    result |= byte << (8 * i);
  }
  return result;
}

// -- barriers and fences ------------------------------------------------------------------------------

__forceinline__ void __syncthreads(EMU_SITE) { ::emu::block_barrier(::emu::Combine::kNone, 0, site); }
__forceinline__ int __syncthreads_or(int value, EMU_SITE) {
  return ::emu::block_barrier(::emu::Combine::kOr, value, site);
}
__forceinline__ int __syncthreads_and(int value, EMU_SITE) {
  return ::emu::block_barrier(::emu::Combine::kAnd, value, site);
}
__forceinline__ int __syncthreads_count(int value, EMU_SITE) {
  return ::emu::block_barrier(::emu::Combine::kCount, value, site);
}
__forceinline__ void __syncwarp(unsigned int mask = 0xffffffffu, EMU_SITE) {
  ::emu::warp_collective(::emu::Collective::kSync, mask, 0, 0, 32, site);
}
__forceinline__ void __threadfence() {}
__forceinline__ void __threadfence_block() {}
__forceinline__ void __threadfence_system() {}

// -- warp collectives ---------------------------------------------------------------------------------

namespace emu {
template <class T>
__forceinline__ T shuffle(Collective what, unsigned int mask, T value, int lane_arg, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  unsigned long long bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(what, mask, bits, lane_arg, width, site);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emu

#define EMU_SHUFFLES(T)                                                                                          \
  __forceinline__ T __shfl_sync(unsigned int mask, T value, int lane, int width = 32, EMU_SITE) {                \
    return ::emu::shuffle(::emu::Collective::kShfl, mask, value, lane, width, site);                             \
  }                                                                                                              \
  __forceinline__ T __shfl_up_sync(unsigned int mask, T value, unsigned int delta, int width = 32, EMU_SITE) {   \
    return ::emu::shuffle(::emu::Collective::kShflUp, mask, value, static_cast<int>(delta), width, site);        \
  }                                                                                                              \
  __forceinline__ T __shfl_down_sync(unsigned int mask, T value, unsigned int delta, int width = 32, EMU_SITE) { \
    return ::emu::shuffle(::emu::Collective::kShflDown, mask, value, static_cast<int>(delta), width, site);      \
  }                                                                                                              \
  __forceinline__ T __shfl_xor_sync(unsigned int mask, T value, int lane_mask, int width = 32, EMU_SITE) {       \
    return ::emu::shuffle(::emu::Collective::kShflXor, mask, value, lane_mask, width, site);                     \
  }
EMU_SHUFFLES(int)
EMU_SHUFFLES(unsigned int)
EMU_SHUFFLES(long)
EMU_SHUFFLES(unsigned long)
EMU_SHUFFLES(long long)
EMU_SHUFFLES(unsigned long long)
EMU_SHUFFLES(float)
EMU_SHUFFLES(double)
#undef EMU_SHUFFLES

__forceinline__ unsigned int __ballot_sync(unsigned int mask, int predicate, EMU_SITE) {
  return static_cast<unsigned int>(
      ::emu::warp_collective(::emu::Collective::kBallot, mask, predicate != 0, 0, 32, site));
}
__forceinline__ int __any_sync(unsigned int mask, int predicate, EMU_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
__forceinline__ int __all_sync(unsigned int mask, int predicate, EMU_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}

// Signed values travel sign-extended to 64 bits, so that one comparison serves both kinds.
#define EMU_REDUCE(name, T, what)                                                                                     \
  __forceinline__ T name(unsigned int mask, T value, EMU_SITE) {                                                      \
    return static_cast<T>(::emu::warp_collective(                                                                     \
        ::emu::Collective::what, mask, static_cast<unsigned long long>(static_cast<long long>(value)), 0, 32, site)); \
  }
EMU_REDUCE(__reduce_max_sync, int, kReduceMax)
EMU_REDUCE(__reduce_max_sync, unsigned int, kReduceMax)
EMU_REDUCE(__reduce_min_sync, int, kReduceMin)
EMU_REDUCE(__reduce_min_sync, unsigned int, kReduceMin)
EMU_REDUCE(__reduce_add_sync, int, kReduceAdd)
EMU_REDUCE(__reduce_add_sync, unsigned int, kReduceAdd)
#undef EMU_REDUCE

// -- atomics: one fiber runs at a time, so plain code on the checked host address is atomic -----------

#define EMU_ATOMIC(name, T, update)                                          \
  __forceinline__ T name(T* ptr, T value, EMU_SITE) {                        \
    T* target = static_cast<T*>(::emu::atomic_target(ptr, sizeof(T), site)); \
    const T old = *target;                                                   \
    *target = update;                                                        \
    return old;                                                              \
  }
#define EMU_ATOMICS(T)                                                       \
  EMU_ATOMIC(atomicAdd, T, old + value)                                      \
  EMU_ATOMIC(atomicMax, T, old > value ? old : value)                        \
  EMU_ATOMIC(atomicMin, T, old < value ? old : value)                        \
  EMU_ATOMIC(atomicExch, T, value)                                           \
  __forceinline__ T atomicCAS(T* ptr, T compare, T value, EMU_SITE) {        \
    T* target = static_cast<T*>(::emu::atomic_target(ptr, sizeof(T), site)); \
    const T old = *target;                                                   \
    if (old == compare) *target = value;                                     \
    return old;                                                              \
  }
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned int)
EMU_ATOMICS(long long)
EMU_ATOMICS(unsigned long long)
EMU_ATOMIC(atomicAdd, float, old + value)
EMU_ATOMIC(atomicAdd, double, old + value)
EMU_ATOMIC(atomicExch, float, value)
EMU_ATOMIC(atomicOr, unsigned int, old | value)
EMU_ATOMIC(atomicAnd, unsigned int, old& value)
EMU_ATOMIC(atomicOr, int, old | value)
EMU_ATOMIC(atomicAnd, int, old& value)
#undef EMU_ATOMICS
#undef EMU_ATOMIC

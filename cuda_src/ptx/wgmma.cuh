// d += a * b by the tensor cores of an SM, a warpgroup together and asynchronously (sm_90a). With w the warp of the
// group, g = lane / 4 and t = lane % 4, d[r] is row 16 w + g + 8 (r / 2 % 2), column 8 (r / 4) + 2 t + r % 2.
#pragma once

struct __half;
struct __nv_bfloat16;

namespace ptx {

// Orders the thread's accesses to registers before those of the wgmma that follow.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-fence
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// The same, with what the compiler might move behind it: everything that the code does to d before.
template <int kCount>
__device__ __forceinline__ void wgmma_fence(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
  wgmma_fence();
}

// Puts the warp's wgmma since its last commit into a group.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-commit-group
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the kPending newest groups are done: with d, with a in registers, and with shared memory.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-wait-group
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Lower word of a matrix descriptor; a step of b bytes adds b / 16. The matrix lies in panels as TMA writes them, with
// rows of kSwizzle bytes (128, 64 or 32). K-major: rows of consecutive k; `pitch` is ignored, and the steps of k stay
// in a panel. MN-major: rows of consecutive columns, and `pitch` bytes to the next panel.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
__device__ __forceinline__ unsigned int wgmma_descriptor(const void* smem_ptr, unsigned int pitch) {
  const unsigned int address = static_cast<unsigned int>(__cvta_generic_to_shared(smem_ptr));
  return (address & 0x3ffff) >> 4 | pitch / 16 << 16;
}

// Its upper word: eight rows make an atom, swizzled.
template <int kSwizzle>
constexpr unsigned int kWgmmaUpper = kSwizzle / 2 | (kSwizzle == 128  ? 1u
                                                     : kSwizzle == 64 ? 2u
                                                                      : 3u)
                                                        << 30;

// The instructions of each width, for pointers of the element type; see the end of this file.
template <int kColumns>
struct Wgmma;

// 64 x kColumns += 64 x 16 * 16 x kColumns; where `accumulate` is false, d is overwritten. a and b are K-major; steps
// are added to their descriptors, constant ones by one instruction.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int kColumns, int kSwizzle>
__device__ __forceinline__ void wgmma_ss(float (&d)[kColumns / 2], unsigned int a, unsigned int b, bool accumulate,
                                         unsigned int a_step = 0, unsigned int b_step = 0) {
  Wgmma<kColumns>::ss(static_cast<const T*>(nullptr), d, a, b, kWgmmaUpper<kSwizzle>, accumulate, a_step, b_step);
}

// The same with a and b MN-major, each in panels of its own.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int kColumns, int kSwizzleA, int kSwizzleB>
__device__ __forceinline__ void wgmma_ss_by_columns(float (&d)[kColumns / 2], unsigned int a, unsigned int b,
                                                    bool accumulate) {
  Wgmma<kColumns>::by_columns(static_cast<const T*>(nullptr), d, a, b, kWgmmaUpper<kSwizzleA>, kWgmmaUpper<kSwizzleB>,
                              accumulate);
}

// As wgmma_ss with a in registers, two elements each, the lower k in the low half: a[j] is row 16 w + g + 8 (j % 2), k
// = 2 t + 8 (j / 2) and the next. b is MN-major.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions-wgmma-mma
template <class T, int kColumns, int kSwizzle>
__device__ __forceinline__ void wgmma_rs(float (&d)[kColumns / 2], const unsigned int (&a)[4], unsigned int b,
                                         bool accumulate, unsigned int b_step = 0) {
  Wgmma<kColumns>::rs(static_cast<const T*>(nullptr), d, a, b, kWgmmaUpper<kSwizzle>, accumulate, b_step);
}

// The accumulators as operands, and by their numbers in an asm statement.
#define WGMMA_D8(i)                                                                                           \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define WGMMA_D32 WGMMA_D8(0), WGMMA_D8(8), WGMMA_D8(16), WGMMA_D8(24)
#define WGMMA_D40 WGMMA_D32, WGMMA_D8(32)
#define WGMMA_D48 WGMMA_D40, WGMMA_D8(40)
#define WGMMA_D56 WGMMA_D48, WGMMA_D8(48)
#define WGMMA_D64 WGMMA_D56, WGMMA_D8(56)
#define WGMMA_D96 WGMMA_D64, WGMMA_D8(64), WGMMA_D8(72), WGMMA_D8(80), WGMMA_D8(88)
#define WGMMA_D128 WGMMA_D96, WGMMA_D8(96), WGMMA_D8(104), WGMMA_D8(112), WGMMA_D8(120)
#define WGMMA_NUMBERS32                                                  \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NUMBERS40 WGMMA_NUMBERS32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_NUMBERS48 WGMMA_NUMBERS40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_NUMBERS56 WGMMA_NUMBERS48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_NUMBERS64 WGMMA_NUMBERS56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NUMBERS96                                                              \
  WGMMA_NUMBERS64                                                                    \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_NUMBERS128                                                                         \
  WGMMA_NUMBERS96                                                                                \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// n0 ... n7: the numbers after the accumulators.
#define WGMMA_TYPE(kColumns, half, T, type, n0, n1, n2, n3, n4, n5, n6, n7)                                           \
  static __device__ __forceinline__ void ss(const T*, float (&d)[kColumns / 2], unsigned int a, unsigned int b,       \
                                            unsigned int upper, bool accumulate, unsigned int a_step,                 \
                                            unsigned int b_step) {                                                    \
    asm volatile("{\n .reg .pred p;\n .reg .b64 a, b, step;\n setp.ne.b32 p, %" #n3                                   \
                 ", 0;\n"                                                                                             \
                 " mov.b64 a, {%" #n0 ", %" #n2 "};\n cvt.u64.u32 step, %" #n4                                        \
                 ";\n add.s64 a, a, step;\n"                                                                          \
                 " mov.b64 b, {%" #n1 ", %" #n2 "};\n cvt.u64.u32 step, %" #n5                                        \
                 ";\n add.s64 b, b, step;\n"                                                                          \
                 " wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type " {" WGMMA_NUMBERS##half     \
                 "}, a, b, p, 1, 1, 0, 0;\n}"                                                                         \
                 : WGMMA_D##half                                                                                      \
                 : "r"(a), "r"(b), "r"(upper), "r"(static_cast<int>(accumulate)), "r"(a_step), "r"(b_step)            \
                 : "memory");                                                                                         \
  }                                                                                                                   \
  static __device__ __forceinline__ void by_columns(const T*, float (&d)[kColumns / 2], unsigned int a,               \
                                                    unsigned int b, unsigned int upper_a, unsigned int upper_b,       \
                                                    bool accumulate) {                                                \
    asm volatile("{\n .reg .pred p;\n .reg .b64 a, b;\n setp.ne.b32 p, %" #n4                                         \
                 ", 0;\n"                                                                                             \
                 " mov.b64 a, {%" #n0 ", %" #n1 "};\n mov.b64 b, {%" #n2 ", %" #n3                                    \
                 "};\n"                                                                                               \
                 " wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type " {" WGMMA_NUMBERS##half     \
                 "}, a, b, p, 1, 1, 1, 1;\n}"                                                                         \
                 : WGMMA_D##half                                                                                      \
                 : "r"(a), "r"(upper_a), "r"(b), "r"(upper_b), "r"(static_cast<int>(accumulate))                      \
                 : "memory");                                                                                         \
  }                                                                                                                   \
  static __device__ __forceinline__ void rs(const T*, float (&d)[kColumns / 2], const unsigned int (&a)[4],           \
                                            unsigned int b, unsigned int upper, bool accumulate,                      \
                                            unsigned int b_step) {                                                    \
    asm volatile("{\n .reg .pred p;\n .reg .b64 b, step;\n setp.ne.b32 p, %" #n6                                      \
                 ", 0;\n"                                                                                             \
                 " mov.b64 b, {%" #n4 ", %" #n5 "};\n cvt.u64.u32 step, %" #n7                                        \
                 ";\n add.s64 b, b, step;\n"                                                                          \
                 " wgmma.mma_async.sync.aligned.m64n" #kColumns "k16.f32." type "." type " {" WGMMA_NUMBERS##half     \
                 "}, "                                                                                                \
                 "{%" #n0 ", %" #n1 ", %" #n2 ", %" #n3 "}, b, p, 1, 1, 1;\n}"                                        \
                 : WGMMA_D##half                                                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(upper), "r"(static_cast<int>(accumulate)), \
                   "r"(b_step)                                                                                        \
                 : "memory");                                                                                         \
  }
#define WGMMA(kColumns, half, ...)                                 \
  template <>                                                      \
  struct Wgmma<kColumns> {                                         \
    WGMMA_TYPE(kColumns, half, __half, "f16", __VA_ARGS__)         \
    WGMMA_TYPE(kColumns, half, __nv_bfloat16, "bf16", __VA_ARGS__) \
  };

WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38, 39)
WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46, 47)
WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54, 55)
WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62, 63)
WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70, 71)
WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102, 103)
WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134, 135)

#undef WGMMA
#undef WGMMA_TYPE

}  // namespace ptx

// Twin of cuda_src/ptx/mma.cuh.
#pragma once

struct __half;
struct __nv_bfloat16;

namespace emu {

template <class T>
struct MmaOf;
template <>
struct MmaOf<__half> {
  static constexpr Collective kWhat = Collective::kMmaHalf;
};
template <>
struct MmaOf<__nv_bfloat16> {
  static constexpr Collective kWhat = Collective::kMmaBfloat16;
};

}  // namespace emu

namespace ptx {

template <class T>
__forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1,
                                  EMU_SITE) {
  ::emu::mma(::emu::MmaOf<T>::kWhat, d, a, b0, b1, site);
}

__forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const unsigned int (&a)[4], unsigned int b0, unsigned int b1,
                                      EMU_SITE) {
  ::emu::mma(::emu::Collective::kMmaTf32, d, a, b0, b1, site);
}

__forceinline__ void mma_m8n8k4_f64(double (&d)[2], double a, double b, EMU_SITE) { ::emu::mma_f64(d, a, b, site); }

}  // namespace ptx

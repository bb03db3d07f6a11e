// Twin of cuda_src/ptx/wgmma.cuh: operands are read as late as allowed.
#pragma once

struct __half;
struct __nv_bfloat16;

namespace emu {

template <class T>
struct WgmmaOf;
template <>
struct WgmmaOf<__half> {
  static constexpr bool kHalf = true;
};
template <>
struct WgmmaOf<__nv_bfloat16> {
  static constexpr bool kHalf = false;
};

template <int kColumns, int kSwizzle>
constexpr void check_wgmma() {
  static_assert(kColumns == 64 || kColumns == 80 || kColumns == 96 || kColumns == 112 || kColumns == 128 ||
                    kColumns == 192 || kColumns == 256,
                "a width that has wrappers");
  static_assert(kSwizzle == 128 || kSwizzle == 64 || kSwizzle == 32, "bytes of a row of a panel");
}

}  // namespace emu

namespace ptx {

__forceinline__ void wgmma_fence(EMU_SITE) { ::emu::wgmma_fence(site); }
template <int kCount>
__forceinline__ void wgmma_fence(float (&)[kCount], EMU_SITE) {
  ::emu::wgmma_fence(site);
}
__forceinline__ void wgmma_commit(EMU_SITE) { ::emu::wgmma_commit(site); }

template <int kPending>
__forceinline__ void wgmma_wait(EMU_SITE) {
  static_assert(kPending >= 0 && kPending <= 7, "a number of groups");
  ::emu::wgmma_wait(kPending, site);
}

__forceinline__ unsigned int wgmma_descriptor(const void* smem_ptr, unsigned int pitch, EMU_SITE) {
  return ::emu::wgmma_descriptor(smem_ptr, pitch, site);
}

template <int kSwizzle>
constexpr unsigned int kWgmmaUpper = kSwizzle / 2 | (kSwizzle == 128  ? 1u
                                                     : kSwizzle == 64 ? 2u
                                                                      : 3u)
                                                        << 30;

template <class T, int kColumns, int kSwizzle>
__forceinline__ void wgmma_ss(float (&d)[kColumns / 2], unsigned int a, unsigned int b, bool accumulate,
                              unsigned int a_step = 0, unsigned int b_step = 0, EMU_SITE) {
  ::emu::check_wgmma<kColumns, kSwizzle>();
  a += a_step, b += b_step;
  ::emu::wgmma(::emu::WgmmaOf<T>::kHalf, kColumns, d, nullptr, a, b, kWgmmaUpper<kSwizzle>, accumulate, site);
}

template <class T, int kColumns, int kSwizzleA, int kSwizzleB>
__forceinline__ void wgmma_ss_by_columns(float (&d)[kColumns / 2], unsigned int a, unsigned int b, bool accumulate,
                                         EMU_SITE) {
  ::emu::check_wgmma<kColumns, kSwizzleA>();
  ::emu::check_wgmma<kColumns, kSwizzleB>();
  ::emu::wgmma(::emu::WgmmaOf<T>::kHalf, kColumns, d, nullptr, a, b, kWgmmaUpper<kSwizzleB>, accumulate, site, true,
               kWgmmaUpper<kSwizzleA>);
}

template <class T, int kColumns, int kSwizzle>
__forceinline__ void wgmma_rs(float (&d)[kColumns / 2], const unsigned int (&a)[4], unsigned int b, bool accumulate,
                              unsigned int b_step = 0, EMU_SITE) {
  ::emu::check_wgmma<kColumns, kSwizzle>();
  b += b_step;
  ::emu::wgmma(::emu::WgmmaOf<T>::kHalf, kColumns, d, a, 0, b, kWgmmaUpper<kSwizzle>, accumulate, site);
}

}  // namespace ptx

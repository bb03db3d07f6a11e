// Twin of cuda_src/ptx/setmaxnreg.cuh.
#pragma once

namespace emu {

template <int kRegisters>
constexpr void check_registers() {
  static_assert(kRegisters >= 24 && kRegisters <= 256 && kRegisters % 8 == 0, "a multiple of 8 from 24 to 256");
}

}  // namespace emu

namespace ptx {

template <int kRegisters>
__forceinline__ void setmaxnreg_dec(EMU_SITE) {
  ::emu::check_registers<kRegisters>();
  ::emu::setmaxnreg_dec(kRegisters, site);
}

template <int kRegisters>
__forceinline__ void setmaxnreg_inc(EMU_SITE) {
  ::emu::check_registers<kRegisters>();
  ::emu::setmaxnreg_inc(kRegisters, site);
}

}  // namespace ptx

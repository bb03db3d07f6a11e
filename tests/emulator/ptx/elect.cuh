// Twin of cuda_src/ptx/elect.cuh: any lane but the first, which hardware does not promise.
#pragma once

namespace ptx {

__forceinline__ bool elect_one(EMU_SITE) { return ::emu::elect_one(site); }

}  // namespace ptx

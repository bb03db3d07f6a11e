// Twin of cuda_src/ptx/fence.cuh.
#pragma once

namespace ptx {

__forceinline__ void fence_proxy_async(EMU_SITE) { ::emu::fence_proxy_async(site); }

}  // namespace ptx

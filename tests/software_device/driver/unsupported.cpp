// Entry points that CuPy links and nothing here needs: textures, arrays, IPC, the linker. They return
// "not supported", and the message names the function. No CUDA header here: the signatures do not matter.
namespace soft {
int unsupported(const char* name);  // failure.cpp
}

#define UNSUPPORTED(name) \
  extern "C" int name() { return soft::unsupported(#name); }

UNSUPPORTED(cudaCreateSurfaceObject)
UNSUPPORTED(cudaCreateTextureObject)
UNSUPPORTED(cudaDestroySurfaceObject)
UNSUPPORTED(cudaDestroyTextureObject)
UNSUPPORTED(cudaDeviceDisablePeerAccess)
UNSUPPORTED(cudaDeviceGetLimit)
UNSUPPORTED(cudaDeviceSetLimit)
UNSUPPORTED(cudaFreeArray)
UNSUPPORTED(cudaGetChannelDesc)
UNSUPPORTED(cudaGetTextureObjectResourceDesc)
UNSUPPORTED(cudaGetTextureObjectTextureDesc)
UNSUPPORTED(cudaGraphDebugDotPrint)
UNSUPPORTED(cudaHostRegister)
UNSUPPORTED(cudaHostUnregister)
UNSUPPORTED(cudaIpcCloseMemHandle)
UNSUPPORTED(cudaIpcGetEventHandle)
UNSUPPORTED(cudaIpcGetMemHandle)
UNSUPPORTED(cudaIpcOpenEventHandle)
UNSUPPORTED(cudaIpcOpenMemHandle)
UNSUPPORTED(cudaMalloc3DArray)
UNSUPPORTED(cudaMallocArray)
UNSUPPORTED(cudaMemcpy2D)
UNSUPPORTED(cudaMemcpy2DAsync)
UNSUPPORTED(cudaMemcpy2DFromArray)
UNSUPPORTED(cudaMemcpy2DFromArrayAsync)
UNSUPPORTED(cudaMemcpy2DToArray)
UNSUPPORTED(cudaMemcpy2DToArrayAsync)
UNSUPPORTED(cudaMemcpy3D)
UNSUPPORTED(cudaMemcpy3DAsync)
UNSUPPORTED(cuLinkCreate_v2)
UNSUPPORTED(cuLinkAddData_v2)
UNSUPPORTED(cuLinkAddFile_v2)
UNSUPPORTED(cuLinkComplete)
UNSUPPORTED(cuLinkDestroy)

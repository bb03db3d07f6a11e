// The entry points of the CUDA driver that CuPy, cuattn and NVRTC call.
// https://docs.nvidia.com/cuda/cuda-driver-api/
#include <cuda.h>

#include <cstring>
#include <string>

#include "modules.hpp"
#include "settings.hpp"

namespace {

using namespace soft;

int the_context;  // there is one, and nobody looks into it

template <class Work>
CUresult driver_call(const char* entry_point, Work work) {
  return static_cast<CUresult>(guarded(entry_point, work));
}

void need(bool condition, const std::string& words) {
  if (!condition) fail(cudaErrorInvalidValue, "cuTensorMapEncodeTiled: " + words);
}

}  // namespace

CUresult cuGetErrorName(CUresult code, const char** name) {
  *name = error_name(code, true);
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult code, const char** words) {
  *words = error_words(code);
  return CUDA_SUCCESS;
}

// NVRTC opens libcuda.so.1 too, and after a cuInit that succeeds asks for a private table. CuPy calls neither.
CUresult cuInit(unsigned) { return CUDA_ERROR_NO_DEVICE; }

CUresult cuGetExportTable(const void** table, const CUuuid*) {
  *table = nullptr;
  return CUDA_ERROR_NOT_FOUND;
}

CUresult cuDriverGetVersion(int* version) {
  *version = kDriverVersion;
  return CUDA_SUCCESS;
}

// -- contexts. CuPy looks for the versions that its headers name, which differ from ours ------------------------------

extern "C" CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }

extern "C" CUresult cuCtxCreate_v2(CUcontext* context, unsigned, CUdevice) {
  return driver_call(__func__, [&] {
    this_thread().has_context = true;
    *context = reinterpret_cast<CUcontext>(&the_context);
  });
}

extern "C" CUresult cuCtxDestroy_v2(CUcontext) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext* context) {
  return driver_call(
      __func__, [&] { *context = this_thread().has_context ? reinterpret_cast<CUcontext>(&the_context) : nullptr; });
}

CUresult cuCtxSetCurrent(CUcontext context) {
  return driver_call(__func__, [&] { this_thread().has_context = context != nullptr; });
}

CUresult cuCtxGetDevice(CUdevice* device) {
  return driver_call(__func__, [&] {
    if (!this_thread().has_context) fail(cudaErrorDeviceUninitialized, "the thread has no context");
    *device = this_thread().device;
  });
}

CUresult cuStreamGetCtx(CUstream stream, CUcontext* context) {
  return driver_call(__func__, [&] {
    find_stream(stream);
    *context = reinterpret_cast<CUcontext>(&the_context);
  });
}

// -- modules and launches ---------------------------------------------------------------------------------------------

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  return driver_call(__func__, [&] {
    refuse_unsafe("cuModuleLoadData");
    *module = reinterpret_cast<CUmodule>(load_module(static_cast<const char*>(image)));
  });
}

CUresult cuModuleLoad(CUmodule* module, const char* path) {
  return driver_call(__func__, [&] {
    refuse_unsafe("cuModuleLoad");
    *module = reinterpret_cast<CUmodule>(load_module_file(path));
  });
}

CUresult cuModuleUnload(CUmodule module) {
  return driver_call(__func__, [&] { unload_module(module); });
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return driver_call(__func__, [&] { *function = reinterpret_cast<CUfunction>(get_kernel(module, name)); });
}

CUresult cuModuleGetGlobal(CUdeviceptr* pointer, size_t* bytes, CUmodule module, const char* name) {
  return driver_call(__func__, [&] {
    uint64_t address = 0;
    size_t size = 0;
    if (!module_global(find_module(module).module, name, address, size)) {
      fail(cudaErrorSymbolNotFound, std::string("the module has no variable ") + name);
    }
    if (pointer) *pointer = address;
    if (bytes) *bytes = size;
  });
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  return driver_call(__func__, [&] { *value = kernel_attribute(function, attribute); });
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  return driver_call(__func__, [&] { set_kernel_attribute(function, attribute, value); });
}

CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function, int threads, size_t bytes) {
  return driver_call(__func__, [&] { *blocks = blocks_per_multiprocessor(function, threads, bytes); });
}

CUresult cuOccupancyMaxPotentialBlockSize(int* grid, int* block, CUfunction function, CUoccupancyB2DSize, size_t bytes,
                                          int) {
  return driver_call(__func__, [&] {
    *block = 256;
    *grid = multiprocessors() * blocks_per_multiprocessor(function, *block, bytes);
  });
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned dynamic_bytes, CUstream stream, void** params,
                        void** extra) {
  return driver_call(__func__, [&] {
    if (extra) fail(cudaErrorNotSupported, "cuLaunchKernel: the software device takes kernelParams, not extra");
    enqueue_launch(function, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, dynamic_bytes, stream, params);
  });
}

// Blocks run one after the other: a barrier of the grid would never be reached by all.
CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                                   unsigned, CUstream, void**) {
  return driver_call(__func__, [&] {
    find_kernel(function);
    fail(cudaErrorNotSupported, "the software device has no cooperative launches");
  });
}

// The map in a layout of our own, which the interpreter shares.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  return driver_call(__func__, [&] {
    if (!this_thread().has_context) fail(cudaErrorDeviceUninitialized, "the thread has no context");
    need(reinterpret_cast<uint64_t>(map) % 64 == 0, "the map must lie at a multiple of 64 bytes");
    need(reinterpret_cast<uint64_t>(address) % 16 == 0, "the array must start at a multiple of 16 bytes");
    need(rank >= 1 && rank <= 5, "the rank must be 1 to 5");
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
      fail(cudaErrorNotSupported,
           "cuTensorMapEncodeTiled: the software device has no interleaving, and fills with zeros");
    }
    TensorMap encoded{};
    for (uint32_t i = 0; i < rank; ++i) {
      const std::string axis = " of dimension " + std::to_string(i);
      need(dims[i] >= 1 && dims[i] <= uint64_t{1} << 32, "the size" + axis + " must be 1 to 2^32");
      need(box[i] >= 1 && box[i] <= 256, "the box" + axis + " must be 1 to 256");
      need(steps[i] == 1, "the element stride" + axis + " must be 1 on the software device");
      encoded.last[i] = static_cast<uint32_t>(dims[i] - 1);
      encoded.box[i] = static_cast<uint16_t>(box[i]);
      if (i + 1 == rank) break;
      need(strides[i] % 16 == 0 && strides[i] < uint64_t{1} << 40,
           "the stride" + axis + " must be a multiple of 16 bytes below 2^40");
      encoded.strides[i] = strides[i];
    }
    encoded.address = reinterpret_cast<uint64_t>(address);
    encoded.rank = static_cast<uint8_t>(rank);
    encoded.type = static_cast<uint8_t>(type);
    encoded.swizzle = static_cast<uint8_t>(swizzle);
    need(encoded.item() != 0 && swizzle <= CU_TENSOR_MAP_SWIZZLE_128B,
         "no such type or swizzle on the software device");
    need(encoded.row_bytes() % 16 == 0, "a row of the box must be a multiple of 16 bytes");
    need(encoded.span() == 0 || encoded.row_bytes() <= encoded.span(), "a row of the box must not exceed the swizzle");
    memset(map, 0, sizeof *map);
    memcpy(map, &encoded, sizeof encoded);
  });
}

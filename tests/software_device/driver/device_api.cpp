// The entry points of the CUDA runtime about devices and errors.
// https://docs.nvidia.com/cuda/cuda-runtime-api/ sections "Device Management" and "Error Handling".
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <string>

#include "failure.hpp"
#include "settings.hpp"
#include "streams.hpp"

namespace {

using namespace soft;

void check_device(int device) {
  if (device < 0 || device >= device_count()) {
    fail(cudaErrorInvalidDevice,
         "device " + std::to_string(device) + " of " + std::to_string(device_count()) + " (SOFTWARE_DEVICE_DEVICES)");
  }
}

// Attributes that are not zero. What nothing depends on is as an A100 or an H100 has it.
int attribute_value(cudaDeviceAttr attribute) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      return compute_capability() / 10;
    case cudaDevAttrComputeCapabilityMinor:
      return compute_capability() % 10;
    case cudaDevAttrMultiProcessorCount:
      return multiprocessors();
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY:
      return kMostThreads;
    case cudaDevAttrMaxBlockDimZ:
      return 64;
    case cudaDevAttrMaxGridDimX:
      return 0x7fffffff;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ:
      return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kShared;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return most_shared_memory();
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return most_shared_memory() + 1024;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      return 2048;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor:
    case cudaDevAttrTotalConstantMemory:
      return 65536;
    case cudaDevAttrWarpSize:
      return 32;
    case cudaDevAttrClockRate:
    case cudaDevAttrMemoryClockRate:
      return 1000000;  // kHz
    case cudaDevAttrL2CacheSize:
      return 1 << 20;
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrConcurrentKernels:
      return 1;
    default:
      return 0;
  }
}

}  // namespace

cudaError_t cudaGetDeviceCount(int* count) {
  return runtime_call(__func__, [&] { *count = device_count(); });
}

cudaError_t cudaGetDevice(int* device) {
  return runtime_call(__func__, [&] { *device = this_thread().device; });
}

cudaError_t cudaSetDevice(int device) {
  return runtime_call(__func__, [&] {
    check_device(device);
    this_thread().device = device;
    this_thread().has_context = true;
  });
}

cudaError_t cudaDeviceSynchronize() {
  return runtime_call(__func__, [&] {
    this_thread().has_context = true;
    refuse_synchronisation("cudaDeviceSynchronize");
    wait_for_device();
  });
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return runtime_call(__func__, [&] {
    check_device(device);
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "software device");
    properties->totalGlobalMem = total_memory();
    properties->sharedMemPerBlock = kShared;
    properties->sharedMemPerBlockOptin = most_shared_memory();
    properties->sharedMemPerMultiprocessor = most_shared_memory() + 1024;
    properties->reservedSharedMemPerBlock = 1024;
    properties->regsPerBlock = properties->regsPerMultiprocessor = 65536;
    properties->warpSize = 32;
    properties->maxThreadsPerBlock = kMostThreads;
    properties->maxThreadsDim[0] = properties->maxThreadsDim[1] = kMostThreads;
    properties->maxThreadsDim[2] = 64;
    properties->maxGridSize[0] = 0x7fffffff;
    properties->maxGridSize[1] = properties->maxGridSize[2] = 65535;
    properties->maxThreadsPerMultiProcessor = 2048;
    properties->maxBlocksPerMultiProcessor = 32;
    properties->totalConstMem = 65536;
    properties->major = compute_capability() / 10;
    properties->minor = compute_capability() % 10;
    properties->multiProcessorCount = multiprocessors();
    properties->l2CacheSize = 1 << 20;
    properties->memoryBusWidth = 64;
    properties->cooperativeLaunch = properties->unifiedAddressing = 1;
    properties->managedMemory = properties->concurrentKernels = 1;
  });
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return runtime_call(__func__, [&] {
    check_device(device);
    *value = attribute_value(attribute);
  });
}

cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return runtime_call(__func__, [&] {
    check_device(device);
    snprintf(text, static_cast<size_t>(length), "0000:%02x:00.0", device + 1);
  });
}

cudaError_t cudaDeviceGetByPCIBusId(int* device, const char* text) {
  return runtime_call(__func__, [&] {
    unsigned number = 0;
    if (sscanf(text, "0000:%x:00.0", &number) != 1) fail(cudaErrorInvalidValue, std::string("not a bus id: ") + text);
    check_device(static_cast<int>(number) - 1);
    *device = static_cast<int>(number) - 1;
  });
}

cudaError_t cudaDeviceCanAccessPeer(int* value, int, int) {
  return runtime_call(__func__, [&] { *value = 1; });
}

cudaError_t cudaDeviceEnablePeerAccess(int device, unsigned) {
  return runtime_call(__func__, [&] { check_device(device); });
}

cudaError_t cudaDriverGetVersion(int* version) {
  return runtime_call(__func__, [&] { *version = kDriverVersion; });
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  return runtime_call(__func__, [&] { *version = CUDART_VERSION; });
}

// These do not count as calls, and change no message.
cudaError_t cudaGetLastError() {
  const cudaError_t code = this_thread().last_error;
  this_thread().last_error = cudaSuccess;
  return code;
}

const char* cudaGetErrorName(cudaError_t code) { return error_name(code, false); }
const char* cudaGetErrorString(cudaError_t code) { return error_words(code); }

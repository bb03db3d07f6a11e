// Error codes and their names, the state of a thread, and the count of calls.
#include "failure.hpp"

#include <cstdio>
#include <cstring>
#include <map>
#include <utility>

#include "settings.hpp"

namespace soft {
namespace {

std::mutex driver_mutex;

struct Less {
  bool operator()(const char* a, const char* b) const { return strcmp(a, b) < 0; }
};
std::map<const char*, uint64_t, Less> calls;

struct Name {
  int code;
  const char *runtime, *driver, *words;
};

constexpr Name kNames[] = {
    {0, "cudaSuccess", "CUDA_SUCCESS", "no error"},
    {1, "cudaErrorInvalidValue", "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {9, "cudaErrorInvalidConfiguration", "CUDA_ERROR_UNKNOWN", "invalid configuration of a launch"},
    {100, "cudaErrorNoDevice", "CUDA_ERROR_NO_DEVICE", "no device"},
    {101, "cudaErrorInvalidDevice", "CUDA_ERROR_INVALID_DEVICE", "no such device"},
    {201, "cudaErrorDeviceUninitialized", "CUDA_ERROR_INVALID_CONTEXT", "the thread has no context"},
    {209, "cudaErrorNoKernelImageForDevice", "CUDA_ERROR_NO_BINARY_FOR_GPU", "no code for this device"},
    {218, "cudaErrorInvalidPtx", "CUDA_ERROR_INVALID_PTX", "invalid PTX"},
    {301, "cudaErrorFileNotFound", "CUDA_ERROR_FILE_NOT_FOUND", "no such file"},
    {400, "cudaErrorInvalidResourceHandle", "CUDA_ERROR_INVALID_HANDLE", "no such stream, event or graph"},
    {401, "cudaErrorIllegalState", "CUDA_ERROR_ILLEGAL_STATE", "not in this state"},
    {500, "cudaErrorSymbolNotFound", "CUDA_ERROR_NOT_FOUND", "no such name"},
    {600, "cudaErrorNotReady", "CUDA_ERROR_NOT_READY", "not done yet"},
    {701, "cudaErrorLaunchOutOfResources", "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources for a launch"},
    {719, "cudaErrorLaunchFailure", "CUDA_ERROR_LAUNCH_FAILED", "a kernel failed"},
    {800, "cudaErrorNotPermitted", "CUDA_ERROR_NOT_PERMITTED", "not permitted"},
    {801, "cudaErrorNotSupported", "CUDA_ERROR_NOT_SUPPORTED", "the software device has no such function"},
    {900, "cudaErrorStreamCaptureUnsupported", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "not during a capture"},
    {901, "cudaErrorStreamCaptureInvalidated", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "an error ended the capture"},
    {902, "cudaErrorStreamCaptureMerge", "CUDA_ERROR_STREAM_CAPTURE_MERGE", "two captures would become one"},
    {903, "cudaErrorStreamCaptureUnmatched", "CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
     "the capture began in another stream"},
    {904, "cudaErrorStreamCaptureUnjoined", "CUDA_ERROR_STREAM_CAPTURE_UNJOINED", "a stream did not join again"},
    {905, "cudaErrorStreamCaptureIsolation", "CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
     "waits for work from before the capture"},
    {906, "cudaErrorStreamCaptureImplicit", "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "the legacy stream during a capture"},
    {907, "cudaErrorCapturedEvent", "CUDA_ERROR_CAPTURED_EVENT", "the event was recorded in a capture"},
    {908, "cudaErrorStreamCaptureWrongThread", "CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD",
     "the capture began in another thread"},
    {912, "cudaErrorInvalidClusterSize", "CUDA_ERROR_INVALID_CLUSTER_SIZE", "a wrong size of a cluster"},
    {999, "cudaErrorUnknown", "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const Name& find_name(int code) {
  for (const Name& name : kNames) {
    if (name.code == code) return name;
  }
  return kNames[sizeof kNames / sizeof *kNames - 1];
}

}  // namespace

void fail(cudaError_t code, std::string words) { throw Failure{code, std::move(words)}; }

ThreadState& this_thread() {
  static thread_local ThreadState state;
  return state;
}

const char* error_name(int code, bool of_driver) {
  return of_driver ? find_name(code).driver : find_name(code).runtime;
}

const char* error_words(int code) {
  const Failure& failure = this_thread().last_failure;
  return failure.code == code && !failure.words.empty() ? failure.words.c_str() : find_name(code).words;
}

void enter(const char* entry_point) {
  ThreadState& thread = this_thread();
  if (thread.in_callback) {
    fail(cudaErrorNotPermitted, std::string(entry_point) + ": a host function of a stream may not call CUDA");
  }
  thread.lock = std::unique_lock<std::mutex>(driver_mutex);
  ++calls[entry_point];
  if (traced()) fprintf(stderr, "software device: %s\n", entry_point);
}

void leave() { this_thread().lock = {}; }

int unsupported(const char* name) {
  return runtime_call(
      name, [name] { fail(cudaErrorNotSupported, std::string("the software device does not support ") + name); });
}

uint64_t calls_of(const char* entry_point) {
  auto found = calls.find(entry_point);
  return found == calls.end() ? 0 : found->second;
}

}  // namespace soft

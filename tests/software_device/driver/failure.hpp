// How an entry point fails: the work inside throws a Failure, the entry point returns its code, and cudaGetErrorString
// or cuGetErrorString gives its words to the exception that CuPy raises.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <stdexcept>
#include <string>

namespace soft {

// Both APIs number what they share alike.
struct Failure {
  cudaError_t code;
  std::string words;
};

[[noreturn]] void fail(cudaError_t code, std::string words);

// The state of the calling thread.
struct ThreadState {
  int device = 0;
  bool has_context = false;  // the runtime makes one at the first call that needs it, the driver never
  bool in_callback = false;  // a host function of a stream, which may not call the API
  cudaError_t last_error = cudaSuccess;
  Failure last_failure{cudaSuccess, {}};
  std::unique_lock<std::mutex> lock;  // of the driver
};
ThreadState& this_thread();

const char* error_name(int code, bool of_driver);
const char* error_words(int code);  // those of the last failure of this thread, if it had this code

// Counts a call of an entry point and takes the driver's lock.
void enter(const char* entry_point);
void leave();
uint64_t calls_of(const char* entry_point);

// What every entry point of the driver or the runtime is made of: `work` throws a Failure where it fails.
template <class Work>
int guarded(const char* entry_point, Work work) {
  struct Inside {
    explicit Inside(const char* name) { enter(name); }
    ~Inside() { leave(); }
  };
  try {
    Inside inside(entry_point);
    work();
    return cudaSuccess;
  } catch (Failure& failure) {
    this_thread().last_failure = failure;
  } catch (std::exception& error) {
    this_thread().last_failure = {cudaErrorUnknown, std::string(entry_point) + ": " + error.what()};
  }
  return this_thread().last_failure.code;
}

template <class Work>
cudaError_t runtime_call(const char* entry_point, Work work) {
  const int code = guarded(entry_point, work);
  if (code != cudaSuccess) this_thread().last_error = static_cast<cudaError_t>(code);
  return static_cast<cudaError_t>(code);
}

}  // namespace soft

// What the tests and plugin.py ask of the device beside CUDA: seed, counts, the message of the last failure.
#include <cstdint>

#include "failure.hpp"
#include "modules.hpp"
#include "streams.hpp"

using namespace soft;

extern "C" {

// Decides the order of what is queued from now on.
int softSeedQueue(uint64_t seed) {
  return guarded(__func__, [&] { set_seed(seed); });
}

// How often the host has waited for the device, whatever the function.
int softSynchronisations(uint64_t* count) {
  return guarded(__func__, [&] { *count = synchronisations(); });
}

int softCalls(const char* entry_point, uint64_t* count) {
  return guarded(__func__, [&] { *count = calls_of(entry_point); });
}

// Runs all that is queued, outside of every count.
int softFlush() {
  return guarded(__func__, [] { flush(); });
}

// Drops what is queued and ends all captures, so that the next test finds a device that works.
int softReset() {
  return guarded(__func__, [] {
    end_all_captures();
    drop_everything();
  });
}

// Bytes of the parameters that a kernel declares: what a launch reads of the host.
int softParamBytes(void* kernel, uint64_t* bytes) {
  return guarded(__func__, [&] {
    *bytes = 0;
    for (const Param& param : function_params(find_kernel(kernel).function)) *bytes = param.offset + param.size;
  });
}

int softStats(uint64_t* warp_instructions, uint64_t* lane_instructions, double* seconds) {
  return guarded(__func__, [&] {
    *warp_instructions = stats().warp_instructions;
    *lane_instructions = stats().lane_instructions;
    *seconds = stats().seconds;
  });
}

const char* softLastMessage() { return this_thread().last_failure.words.c_str(); }

}  // extern "C"

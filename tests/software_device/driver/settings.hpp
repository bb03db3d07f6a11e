// What the environment sets: the device that is offered, and the seed of every legal choice.
#pragma once

#include <cstddef>

#include "../device.hpp"

namespace soft {

int device_count();
size_t total_memory();     // bytes of one device
int most_shared_memory();  // a block can be given, with the opt-in
bool launches_block();     // CUDA_LAUNCH_BLOCKING=1: nothing is put off
bool traced();             // SOFTWARE_DEVICE_TRACE=1: entry points on stderr

constexpr int kShared = 48 << 10;  // of a block without the opt-in
constexpr int kMostThreads = 1024;
constexpr int kDriverVersion = 13050;

}  // namespace soft

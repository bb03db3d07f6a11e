// The environment variables SOFTWARE_DEVICE_*, read once.
#include "settings.hpp"

#include <cstdlib>
#include <cstring>

namespace soft {
namespace {

long number(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value && *value ? strtol(value, nullptr, 10) : otherwise;
}

uint64_t& random_state() {
  static uint64_t state = static_cast<uint64_t>(number("SOFTWARE_DEVICE_SEED", number("CUATTN_TEST_SEED", 0)));
  return state;
}

}  // namespace

int compute_capability() {
  static const int value = static_cast<int>(number("SOFTWARE_DEVICE_CC", 80));
  return value;
}

int multiprocessors() {  // of an A100 and of an H100, as plans depend on them
  static const int value = static_cast<int>(number("SOFTWARE_DEVICE_SMS", compute_capability() >= 90 ? 132 : 108));
  return value;
}

int device_count() {
  static const int value = static_cast<int>(number("SOFTWARE_DEVICE_DEVICES", 1));
  return value;
}

size_t total_memory() {
  static const size_t value = static_cast<size_t>(number("SOFTWARE_DEVICE_GIB", 8)) << 30;
  return value;
}

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
int most_shared_memory() {
  switch (compute_capability()) {
    case 80:
    case 87:
      return 163 << 10;
    case 75:
      return 64 << 10;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 << 10;
    default:
      return compute_capability() >= 90 ? 227 << 10 : 96 << 10;
  }
}

bool launches_block() {
  static const bool value = number("CUDA_LAUNCH_BLOCKING", 0) != 0;
  return value;
}

bool traced() {
  static const bool value = number("SOFTWARE_DEVICE_TRACE", 0) != 0;
  return value;
}

uint64_t random_below(uint64_t bound) {  // splitmix64
  uint64_t z = random_state() += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return (z ^ z >> 31) % bound;
}

void set_seed(uint64_t seed) { random_state() = seed; }

}  // namespace soft

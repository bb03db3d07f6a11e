// Allocations, and the bytes that copies and fills move.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../device.hpp"

namespace soft {

// A new allocation, which no other ever shares its address with while `kKept` younger ones are freed. With `later` it
// is not alive before begin_life(), which the order of a stream decides.
void* allocate(size_t bytes, RegionKind kind, bool later = false);
void begin_life(uint64_t base);
void end_life(uint64_t base);  // until the next begin_life: the memory of a graph
void release(uint64_t base);
size_t used_memory();

// The kind of memory at `address`; -1 is memory of the process that CUDA knows nothing of.
int kind_of(const void* address);

// What is wrong with [address, address + bytes) as an operand of a copy; an empty string if it is all there.
std::string check_range(const void* address, size_t bytes, const char* what);

char* bytes_at(const void* address);

// Bytes of the device have a value now; or as far as those that they are copied from. Memory of the host always has.
void note_write(const void* to, size_t bytes);
void note_copy(const void* to, const void* from, size_t bytes);

}  // namespace soft

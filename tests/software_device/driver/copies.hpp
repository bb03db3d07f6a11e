// Copies and fills as operations of a stream.
#pragma once

#include <cstddef>

#include "streams.hpp"

namespace soft {

// `host_waits`: cudaMemcpy and not cudaMemcpyAsync.
void enqueue_copy(const char* name, void* to, const void* from, size_t bytes, Stream& stream, bool host_waits);
void enqueue_fill(const char* name, void* to, int value, size_t bytes, Stream& stream);

}  // namespace soft

// What the driver reads in a cubin: the PTX behind it, and what ptxas made of its kernels.
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace soft {

bool is_cubin(const char* image);
// The PTX behind a cubin, or the image itself where it is PTX.
const char* find_ptx(const char* image);
// Registers per thread of each kernel.
std::map<std::string, uint32_t> registers_of(const char* cubin);

}  // namespace soft

// What memory pools count.
#pragma once

#include <cstdint>

namespace soft {

void count_in_pool(void* pool, uint64_t base, uint64_t bytes);  // null: the current one of the device
void leave_pool(uint64_t base);

}  // namespace soft

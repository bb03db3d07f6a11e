// Boxes of tensors by the Tensor Memory Accelerator. All is checked when a box is asked for; a load lands when a thread
// waits for its mbarrier, and a store reads its box when its thread waits for that. A load fills with zeros element by
// element, but a store writes the last 16 bytes of a row whole, wherever the tensor ends in them
// (https://github.com/triton-lang/triton/issues/11583, on an H100).
#include "state.hpp"

namespace emu {

const uint8_t* read_global(Thread& thread, uint64_t address, int size, int alignment, bool by_proxy, Site site);
uint8_t* write_global(Thread& thread, uint64_t address, int size, int alignment, bool by_proxy, Site site);
uint32_t box_offset(const Thread& thread, const void* ptr, uint64_t size, uint32_t alignment, Site site);
void begin_bulk_load(Thread& thread, uint32_t offset, uint32_t size, int phase, Site site);
void check_bulk_store(Thread& thread, uint32_t offset, uint32_t size, Site site);
void end_bulk_store(const Thread& thread, uint32_t offset, uint32_t size);
MBarrier& async_mbarrier(Thread& thread, void* mbarrier, Site site);
int async_phase(MBarrier& bar, const char* what);
void expect_or_send(const Thread& thread, MBarrier& bar, int64_t expected, int64_t sent, Site site);

namespace {

// As tensor_map() of __init__.py packs it. `self` is where a launch has put it; other copies are none.
struct TensorMap {
  uint64_t magic, address, dims[5], strides[4];
  uint16_t box[5], item, swizzle, unused;
  uint64_t unused_words[2], self;

  uint64_t box_bytes() const { return uint64_t(row_bytes()) * box[1] * box[2] * box[3] * box[4]; }
  uint32_t row_bytes() const { return uint32_t(box[0]) * item; }
};
static_assert(sizeof(TensorMap) == 128, "as on a device");
constexpr uint64_t kMagic = 0x70616d726f736e65;
constexpr int kChunk = 16;  // bytes that a store writes together

TensorMap map_at(const Thread& thread, const void* ptr, Site site) {
  TensorMap map = {};
  const char* const address = static_cast<const char*>(ptr);
  const bool on_stack = address > reinterpret_cast<const char*>(&map) && address + sizeof map <= thread.stack_top;
  if (on_stack) memcpy(&map, ptr, sizeof map);  // where the launch has put its parameters
  if (!on_stack || map.self != reinterpret_cast<uint64_t>(ptr)) {
    fault(thread, site, "a tensor map that is not in the launch's parameters, or a copy of one");
  }
  if (map.magic != kMagic) fault(thread, site, "the parameters hold no tensor map of the emulator there");
  return map;
}

// Calls visit(address, offset, size) for the rows of a box as far as they lie in the tensor; `offset` is in the box.
template <class Visit>
void for_rows(const TensorMap& map, const int* c, Visit visit) {
  // Coordinate of the i-th in the box; a negative one is beyond the end, too.
  const auto at = [&](int d, int i) { return static_cast<uint64_t>(static_cast<int64_t>(c[d]) + i); };
  const auto inside = [&](int d, int i) { return at(d, i) < map.dims[d]; };
  int begin = 0, end = map.box[0];
  while (begin < end && !inside(0, begin)) ++begin;
  while (begin < end && !inside(0, end - 1)) --end;
  if (begin == end) return;
  int i[5] = {};
  uint32_t row = 0;
  for (i[4] = 0; i[4] < map.box[4]; ++i[4]) {
    for (i[3] = 0; i[3] < map.box[3]; ++i[3]) {
      for (i[2] = 0; i[2] < map.box[2]; ++i[2]) {
        for (i[1] = 0; i[1] < map.box[1]; ++i[1], ++row) {
          if (!inside(1, i[1]) || !inside(2, i[2]) || !inside(3, i[3]) || !inside(4, i[4])) continue;
          uint64_t address = map.address + at(0, begin) * map.item;
          for (int d = 1; d < 5; ++d) address += at(d, i[d]) * map.strides[d - 1];
          visit(address, row * map.row_bytes() + begin * map.item, static_cast<uint32_t>(end - begin) * map.item);
        }
      }
    }
  }
}

// Calls visit(address, offset, size) for the pieces of a box from `offset` on; `address` is in shared memory.
template <class Visit>
void for_pieces(const BulkBox& box, uint32_t offset, uint32_t size, Visit visit) {
  if (box.swizzle == 0) return visit(box.offset + offset, offset, size);
  const uint32_t mask = box.swizzle / 16 - 1;
  for (uint32_t end; size > 0; size -= end - offset, offset = end) {
    end = offset / 16 * 16 + 16;
    if (end > offset + size) end = offset + size;
    const uint32_t address = box.offset + offset;
    visit(address ^ (address >> 7 & mask) << 4, offset, end - offset);
  }
}

BulkBox box_at(const Thread& thread, const void* smem_ptr, const TensorMap& map, Site site) {
  const uint32_t alignment = map.swizzle == 0 ? 128 : 8 * map.swizzle;
  const uint32_t offset = box_offset(thread, smem_ptr, map.box_bytes(), alignment, site);
  return {offset, static_cast<uint32_t>(map.box_bytes()), map.swizzle, {}, site};
}

// Sectors of the rows of a box; rows that follow each other may share one.
class SectorCount {
 public:
  void add(uint64_t address, uint32_t size) {
    const uint64_t first = address / 32, last = (address + size - 1) / 32;
    count_ += last - first + (first != last_);
    last_ = last;
  }
  uint64_t count() const { return count_; }

 private:
  uint64_t last_ = UINT64_MAX, count_ = 0;
};

void read_box(const BulkStore& store, const Block& block) {
  for (const BulkRow& row : store.rows) {
    for_pieces(store, row.offset, row.size, [&](uint32_t address, uint32_t offset, uint32_t size) {
      memcpy(row.global + (offset - row.offset), block.arena_start + address, size);
    });
  }
}

}  // namespace

// A member of the launch's parameters goes to a thread's copy of them.
void copy_tensor_map(unsigned long long* to, const unsigned long long* from) {
  memcpy(to, from, sizeof(TensorMap));
  const uint64_t offset = reinterpret_cast<uint64_t>(from) - reinterpret_cast<uint64_t>(machine.launch.params);
  to[15] = offset < machine.launch.params_size ? reinterpret_cast<uint64_t>(to) : 0;
}

void prefetch_tensormap(const void* map, Site site) {
  const Thread& thread = running();
  check_arch(thread, 900, "prefetch_tensormap", site);
  map_at(thread, map, site);
}

void cp_async_bulk_tensor_load(void* smem_ptr, const void* map_ptr, void* mbarrier, const int* c, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "cp_async_bulk_tensor_load", site);
  const TensorMap map = map_at(thread, map_ptr, site);
  BulkLoad load = {box_at(thread, smem_ptr, map, site), std::vector<uint8_t>(map.box_bytes())};
  MBarrier& bar = async_mbarrier(thread, mbarrier, site);
  SectorCount sectors;
  for_rows(map, c, [&](uint64_t address, uint32_t offset, uint32_t size) {
    const uint8_t* source = read_global(thread, address, static_cast<int>(size), map.item, true, site);
    memcpy(load.bytes.data() + offset, source, size);
    load.rows.push_back({const_cast<uint8_t*>(source), offset, size});
    machine.counters.global_bytes_read += size;
    sectors.add(address, size);
  });
  thread.loads.push_back(async_phase(bar, "a bulk load"));
  begin_bulk_load(thread, load.offset, load.size, thread.loads.back(), site);
  machine.counters.global_sectors_read += sectors.count();
  machine.counters.global_requests += !load.rows.empty();
  machine.counters.bulk_bytes += load.size;
  bar.loads.push_back(std::move(load));
  know_into(bar.sent, thread);
  expect_or_send(thread, bar, 0, static_cast<int64_t>(map.box_bytes()), site);
}

void land(const BulkLoad& load, Block& block) {
  for (const BulkRow& row : load.rows) {
    if (memcmp(load.bytes.data() + row.offset, row.global, row.size) != 0) {
      fault(running(), load.site, "the source of a bulk load was overwritten before it landed");
    }
  }
  for_pieces(load, 0, load.size, [&](uint32_t address, uint32_t offset, uint32_t size) {
    memcpy(block.arena_start + address, load.bytes.data() + offset, size);
  });
}

void cp_async_bulk_tensor_store(const void* map_ptr, const void* smem_ptr, const int* c, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "cp_async_bulk_tensor_store", site);
  const TensorMap map = map_at(thread, map_ptr, site);
  BulkStore store = {box_at(thread, smem_ptr, map, site), thread.index, thread.bulk_groups};
  if (int64_t(c[0]) * map.item % kChunk != 0) {
    fault(thread, site, "a bulk store from column %d on: what it overwrites is known for multiples of 16 bytes only",
          c[0]);
  }
  SectorCount sectors;
  for_rows(map, c, [&](uint64_t address, uint32_t offset, uint32_t size) {
    size = (size + kChunk - 1) / kChunk * kChunk;
    if (size == map.row_bytes()) {  // swizzles permute within a row
      check_bulk_store(thread, store.offset + offset, size, site);
    } else {
      for_pieces(store, offset, size,
                 [&](uint32_t from, uint32_t, uint32_t bytes) { check_bulk_store(thread, from, bytes, site); });
    }
    store.rows.push_back({write_global(thread, address, static_cast<int>(size), map.item, true, site), offset, size});
    machine.counters.global_bytes_written += size;
    sectors.add(address, size);
  });
  machine.counters.global_sectors_written += sectors.count();
  machine.counters.global_requests += !store.rows.empty();
  thread.block->stores.push_back(std::move(store));
}

void cp_async_bulk_commit(Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "cp_async_bulk_commit", site);
  ++thread.bulk_groups;
}

void cp_async_bulk_wait_read(int pending, Site site) {
  Thread& thread = running();
  check_arch(thread, 900, "cp_async_bulk_wait_read", site);
  std::vector<BulkStore>& stores = thread.block->stores;
  for (size_t i = 0; i < stores.size();) {
    const BulkStore& store = stores[i];
    if (store.thread != thread.index || static_cast<uint64_t>(store.group) + pending >= thread.bulk_groups) {
      ++i;
      continue;
    }
    read_box(store, *thread.block);
    end_bulk_store(thread, store.offset, store.size);
    stores.erase(stores.begin() + static_cast<long>(i));
  }
}

void check_stores_read(const Thread& thread) {
  for (const BulkStore& store : thread.block->stores) {
    if (store.thread != thread.index) continue;
    fault(thread, store.site, "exited with a bulk store that it %s",
          store.group < thread.bulk_groups ? "never waited for with cp_async_bulk_wait_read" : "never committed");
  }
}

}  // namespace emu

// Shared memory: allocation, bounds, poison and races. Each byte knows its last writer and up to two readers, and as
// many strong accesses, which is PTX's word for atomics and relaxed loads and stores.
#include <algorithm>

#include "state.hpp"

namespace emu {

void check_readings(Thread& thread, const Block& target, uint32_t offset, uint32_t size, Site site);
void forget_readings(const Block& target, uint32_t offset, uint32_t size);

namespace {

constexpr uint32_t kRedZone = 64;             // between arrays, so that running off one is out of bounds
constexpr uint32_t kArenaBytes = 320 * 1024;  // the largest block's shared memory, and red zones
constexpr uint64_t kStaticLimit = 48 * 1024;
constexpr uint32_t kAlignment = 128;
constexpr uint32_t kArenaAlignment = 1024;  // swizzles repeat within it

uint32_t round_up(uint64_t n) { return static_cast<uint32_t>((n + kAlignment - 1) / kAlignment * kAlignment); }

void poison(Block& block, uint32_t begin, uint32_t end) {
  memset(block.arena_start + begin, 0xff, end - begin);  // NaN in every floating-point type
  memset(static_cast<void*>(block.shadow.data() + begin), 0, (end - begin) * sizeof(ShadowByte));
}

bool in_an_array(uint32_t offset, int size) {
  if (offset < machine.launch.dynamic_smem) return offset + size <= machine.launch.dynamic_smem;
  for (const SmemArray& array : machine.smem_arrays) {
    if (offset >= array.offset && offset + size <= array.offset + array.size) return true;
  }
  return false;
}

// What a plain access is to, where a strong one has strong_object().
constexpr int kPlainAccess = -1;

int strong_object(uint32_t offset, int size) { return static_cast<int>(offset) * 32 + size; }

// Strong accesses to exactly the same bytes never race with each other.
bool conflicts(const Thread& thread, uint32_t stamp, int object) {
  if (stamp == 0 || stamp == thread.stamp) return false;
  const Stamp& earlier = machine.stamps[stamp];
  if (earlier.kind == Stamp::kStrong && earlier.object == object) return false;
  return !ordered(thread, earlier);
}

[[noreturn]] void fault_race(const Thread& thread, Site site, const char* verb, uint32_t offset, uint32_t stamp,
                             const char* other_verb, const char* missing = "barrier") {
  const Stamp& other = machine.stamps[stamp];
  fault(thread, site, "race in shared memory: %s byte %u, which %sthread %u of block rank %u %s, with no %s between",
        verb, offset, other.kind == Stamp::kWarp ? "the warp of " : "", other.thread, other.rank, other_verb, missing);
}

// May `thread` touch bytes that st_async or a bulk load delivered?
void check_async(Thread& thread, const Stamp& stamp, uint32_t offset, const char* verb, Site site) {
  if (thread.checked_async == stamp.object) return;
  const AsyncPhase& phase = machine.async_phases[stamp.object];
  if (!phase.landed) {
    fault(thread, site, "%s shared byte %u, to which %s is still in flight", verb, offset, phase.what);
  }
  for (const Stamp& passed : phase.passed) {
    if (!ordered(thread, passed)) continue;
    thread.checked_async = stamp.object;
    return;
  }
  fault(thread, site, "race in shared memory: %s byte %u, which %s wrote, without having waited on its mbarrier", verb,
        offset, phase.what);
}

void check_against_writer(Thread& thread, uint32_t writer, uint32_t offset, int object, const char* verb, Site site) {
  const Stamp& stamp = machine.stamps[writer];
  if (stamp.kind == Stamp::kMBarrier)
    fault(thread, site, "%s shared byte %u, which is part of an mbarrier", verb, offset);
  if (stamp.kind == Stamp::kCopy) {
    fault(thread, site, "%s shared byte %u of a cp.async that has not landed: thread %u of block rank %u began it",
          verb, offset, stamp.thread, stamp.rank);
  }
  if (stamp.kind == Stamp::kAsync) return check_async(thread, stamp, offset, verb, site);
  if (conflicts(thread, writer, object)) fault_race(thread, site, verb, offset, writer, "wrote");
}

// Keeps stamps of two warps: a later access, of whatever warp, is then of another warp than at least one of them.
void keep(const Thread& thread, uint32_t (&kept)[2], uint32_t stamp) {
  if (kept[0] == stamp) return;
  const Stamp& first = machine.stamps[kept[0]];
  const bool replace = kept[0] == 0 || (first.thread / 32 == thread.index / 32 && first.rank == thread.block->rank) ||
                       ordered(thread, first);
  kept[replace ? 0 : 1] = stamp;
}

void check_none_conflicts(Thread& thread, const uint32_t (&stamps)[2], uint32_t offset, int object, const char* verb,
                          const char* other_verb, Site site) {
  for (const uint32_t stamp : stamps) {
    if (conflicts(thread, stamp, object)) fault_race(thread, site, verb, offset, stamp, other_verb);
  }
}

void check_read(Thread& thread, const Block& block, uint32_t offset, int size, int object, Site site) {
  uint32_t checked = object == kPlainAccess ? thread.stamp : 0;
  for (uint32_t b = offset; b < offset + size; ++b) {
    const ShadowByte& byte = block.shadow[b];
    if (byte.writer == 0) fault(thread, site, "reads shared byte %u, which was never written", b);
    if (byte.writer != checked) check_against_writer(thread, byte.writer, b, object, "reads", site);
    checked = byte.writer;
    if (byte.strong == 0) continue;
    const StrongAccesses& strong = block.strong[byte.strong];
    check_none_conflicts(thread, strong.writer, b, object, "reads", "writes relaxed or atomically", site);
  }
}

// Nothing may write a box that a bulk store has not read, however it is ordered.
void check_not_stored_from(const Thread& thread, const Block& target, uint32_t offset, uint32_t size, const char* verb,
                           Site site) {
  for (const BulkStore& store : target.stores) {
    if (offset >= store.offset + store.size || store.offset >= offset + size) continue;
    fault(thread, site, "%s shared byte %u of a box that a bulk store of thread %d has yet to read", verb,
          std::max(offset, store.offset), store.thread);
  }
}

void check_write(Thread& thread, const Block& target, uint32_t offset, int size, int object, Site site) {
  check_not_stored_from(thread, target, offset, static_cast<uint32_t>(size), "writes", site);
  check_readings(thread, target, offset, static_cast<uint32_t>(size), site);
  for (uint32_t b = offset; b < offset + size; ++b) {
    const ShadowByte& byte = target.shadow[b];
    if (b > offset && byte == target.shadow[b - 1]) continue;
    if (byte.writer != 0 && byte.writer != thread.stamp) {
      check_against_writer(thread, byte.writer, b, object, "writes", site);
    }
    check_none_conflicts(thread, byte.reader, b, object, "writes", "reads", site);
    if (byte.strong == 0) continue;
    const StrongAccesses& strong = target.strong[byte.strong];
    check_none_conflicts(thread, strong.writer, b, object, "writes", "writes relaxed or atomically", site);
    check_none_conflicts(thread, strong.reader, b, object, "writes", "reads relaxed", site);
  }
}

// A plain write, checked before: whatever else comes to these bytes is ordered after it, or an error.
void begin_anew(Block& target, uint32_t offset, int size, uint32_t writer) {
  for (uint32_t b = offset; b < offset + size; ++b) {
    ShadowByte& byte = target.shadow[b];
    if (byte.strong != 0) target.strong[byte.strong] = {};
    byte = {writer, {0, 0}, byte.strong};
  }
}

enum class Strong { kRead, kWrite };

void record_strong(Thread& thread, uint32_t offset, int size, Strong what) {
  Block& block = *thread.block;
  const int object = strong_object(offset, size);
  if (thread.strong_stamp == 0 || machine.stamps[thread.strong_stamp].object != object) {
    thread.strong_stamp = static_cast<uint32_t>(machine.stamps.size());
    machine.stamps.push_back(make_stamp(thread, Stamp::kStrong));
    machine.stamps.back().object = object;
  }
  for (uint32_t b = offset; b < offset + size; ++b) {
    ShadowByte& byte = block.shadow[b];
    if (byte.strong == 0) {
      byte.strong = static_cast<uint32_t>(block.strong.size());
      block.strong.emplace_back();
    }
    StrongAccesses& strong = block.strong[byte.strong];
    keep(thread, what == Strong::kWrite ? strong.writer : strong.reader, thread.strong_stamp);
    if (what == Strong::kWrite && byte.writer == 0) byte.writer = thread.strong_stamp;
  }
}

}  // namespace

void begin_shared_memory() {
  for (Block& block : machine.blocks) {
    if (block.arena.empty()) {
      block.arena.resize(kArenaBytes + kArenaAlignment);
      block.shadow.resize(kArenaBytes);
      const uint64_t start = reinterpret_cast<uint64_t>(block.arena.data());
      block.arena_start = block.arena.data() + (kArenaAlignment - start % kArenaAlignment);
    }
    if (machine.smem_arrays.empty()) machine.smem_top = round_up(machine.launch.dynamic_smem + kRedZone);
    poison(block, 0, machine.smem_top);
    block.strong.assign(1, {});
  }
}

void* dynamic_smem(int alignment) {
  const Thread& thread = running();
  int& first = machine.dynamic_alignment;
  if (first == 0) first = alignment;
  if (first != alignment) {
    fault(thread, {nullptr, 0}, "dynamic_smem with two alignments, %d and %d, in one program", first, alignment);
  }
  return thread.block->arena_start;
}

void* static_smem(const void* key, long long bytes) {
  const Thread& thread = running();
  for (const SmemArray& array : machine.smem_arrays) {
    if (array.key == key) return thread.block->arena_start + array.offset;
  }
  const Site nowhere = {nullptr, 0};
  machine.static_smem = (machine.static_smem + 15) / 16 * 16 + bytes;
  if (machine.static_smem > kStaticLimit) {
    fault(thread, nowhere, "static shared memory of %llu bytes; the limit is 48 KiB",
          static_cast<unsigned long long>(machine.static_smem));
  }
  if (machine.static_smem + machine.launch.dynamic_smem > machine.launch.smem_limit) {
    fault(thread, nowhere, "%llu bytes of static and %llu of dynamic shared memory; the limit is %llu",
          static_cast<unsigned long long>(machine.static_smem),
          static_cast<unsigned long long>(machine.launch.dynamic_smem),
          static_cast<unsigned long long>(machine.launch.smem_limit));
  }
  const uint32_t offset = machine.smem_top;
  machine.smem_arrays.push_back({key, offset, static_cast<uint32_t>(bytes)});
  machine.smem_top = round_up(offset + bytes + kRedZone);
  if (machine.smem_top > kArenaBytes) fault(thread, nowhere, "too many static shared arrays for the emulator's arena");
  for (Block& block : machine.blocks) poison(block, offset, machine.smem_top);
  return thread.block->arena_start + offset;
}

uint32_t smem_offset(Thread& thread, const void* ptr, int size, Site site) {
  const uint64_t address = reinterpret_cast<uint64_t>(ptr),
                 start = reinterpret_cast<uint64_t>(thread.block->arena_start);
  const int64_t offset = static_cast<int64_t>(address - start);
  if (offset < 0 || offset >= kArenaBytes) fault(thread, site, "a pointer that is not to the block's shared memory");
  if (!in_an_array(static_cast<uint32_t>(offset), size)) {
    fault(thread, site, "%d bytes of shared memory out of bounds: offset %lld; dynamic shared memory has %llu bytes",
          size, static_cast<long long>(offset), static_cast<unsigned long long>(machine.launch.dynamic_smem));
  }
  if (offset % size != 0) {
    fault(thread, site, "%d bytes of shared memory misaligned: offset %lld", size, static_cast<long long>(offset));
  }
  return static_cast<uint32_t>(offset);
}

void shared_load(const void* ptr, void* out, int size, Site site) {
  Thread& thread = running();
  Block& block = *thread.block;
  const uint32_t offset = smem_offset(thread, ptr, size, site), me = stamp_of(thread);
  check_read(thread, block, offset, size, kPlainAccess, site);
  ShadowByte before{};  // the last byte, as it was
  for (ShadowByte* byte = &block.shadow[offset]; byte < &block.shadow[offset] + size; ++byte) {
    if (byte > &block.shadow[offset] && *byte == before) {
      *byte = byte[-1];
      continue;
    }
    before = *byte;
    keep(thread, byte->reader, me);
  }
  memcpy(out, ptr, size);
  log_access(thread, AccessSite::kShared, place_of(thread, __builtin_frame_address(0)), offset, size);
}

void shared_store(void* ptr, const void* value, int size, Site site) {
  Thread& thread = running();
  Block& block = *thread.block;
  const uint32_t offset = smem_offset(thread, ptr, size, site), me = stamp_of(thread);
  check_write(thread, block, offset, size, kPlainAccess, site);
  begin_anew(block, offset, size, me);
  memcpy(ptr, value, size);
  log_access(thread, AccessSite::kShared, place_of(thread, __builtin_frame_address(0)), offset, size);
}

void shared_load_relaxed(const void* ptr, void* out, int size, Site site) {
  Thread& thread = running();
  const uint32_t offset = smem_offset(thread, ptr, size, site);
  check_read(thread, *thread.block, offset, size, strong_object(offset, size), site);
  record_strong(thread, offset, size, Strong::kRead);
  memcpy(out, ptr, size);
  log_access(thread, AccessSite::kShared, place_of(thread, __builtin_frame_address(0)), offset, size);
}

void shared_store_relaxed(void* ptr, const void* value, int size, Site site) {
  Thread& thread = running();
  const uint32_t offset = smem_offset(thread, ptr, size, site);
  check_write(thread, *thread.block, offset, size, strong_object(offset, size), site);
  record_strong(thread, offset, size, Strong::kWrite);
  memcpy(ptr, value, size);
  log_access(thread, AccessSite::kShared, place_of(thread, __builtin_frame_address(0)), offset, size);
}

void* shared_atomic_target(Thread& thread, void* ptr, int size, Site site) {
  const int64_t distance = static_cast<uint8_t*>(ptr) - thread.block->arena_start;
  if (distance < 0 || distance >= kArenaBytes) return nullptr;
  const uint32_t offset = smem_offset(thread, ptr, size, site);
  const Block& block = *thread.block;
  for (uint32_t b = offset; b < offset + size; ++b) {
    if (block.shadow[b].writer == 0) {
      fault(thread, site, "atomic update of shared byte %u, which was never written", b);
    }
  }
  check_write(thread, block, offset, size, strong_object(offset, size), site);
  record_strong(thread, offset, size, Strong::kWrite);
  return ptr;
}

// Checks that no other thread uses the 16 bytes at `ptr`, and lets none use them until they land.
uint32_t begin_copy(Thread& thread, void* ptr, Site site) {
  Block& block = *thread.block;
  const uint32_t offset = smem_offset(thread, ptr, 16, site);
  stamp_of(thread);
  check_write(thread, block, offset, 16, kPlainAccess, site);
  if (thread.copy_stamp == 0) {
    thread.copy_stamp = static_cast<uint32_t>(machine.stamps.size());
    machine.stamps.push_back(make_stamp(thread, Stamp::kCopy));
  }
  begin_anew(block, offset, 16, thread.copy_stamp);
  return offset;
}

void land_copy(Thread& thread, const Copy& copy) {
  Block& block = *thread.block;
  begin_anew(block, copy.offset, 16, stamp_of(thread));
  memcpy(block.arena_start + copy.offset, copy.bytes, 16);
}

// A row of 16 bytes, read on behalf of a whole warp, whose stamp is `me`: every lane must come after its writers, and
// the next writer after every lane.
const uint8_t* read_row(Warp& warp, int lane, const void* ptr, uint32_t me, Site site) {
  Thread& thread = warp.threads[lane];
  Block& block = *thread.block;
  const uint32_t offset = smem_offset(thread, ptr, 16, site);
  ShadowByte* const row = block.shadow.data() + offset;
  const bool alike = memcmp(row, row + 1, 15 * sizeof *row) == 0;
  for (uint32_t b = offset; b < offset + (alike ? 1 : 16); ++b) {
    ShadowByte& byte = block.shadow[b];
    if (warp.passed.size() <= byte.writer) warp.passed.resize(machine.stamps.size());
    if (!warp.passed[byte.writer] || byte.strong != 0) {
      check_read(thread, block, b, 1, kPlainAccess, site);
      for (int other = 0; other < 32; ++other) check_read(warp.threads[other], block, b, 1, kPlainAccess, site);
      warp.passed[byte.writer] = true;
    }
    keep(thread, byte.reader, me);
  }
  if (alike && memcmp(row, row + 1, sizeof *row) != 0) std::fill(row + 1, row + 16, row[0]);
  return block.arena_start + offset;
}

// The same for a row that is written.
void write_row(Warp& warp, int lane, void* ptr, const void* value, Site site) {
  Thread& thread = warp.threads[lane];
  Block& block = *thread.block;
  const uint32_t offset = smem_offset(thread, ptr, 16, site);
  for (uint32_t b = offset; b < offset + 16; ++b) {
    if (b > offset && block.shadow[b] == block.shadow[b - 1]) continue;
    check_write(thread, block, b, 1, kPlainAccess, site);
    for (int other = 0; other < 32; ++other) check_write(warp.threads[other], block, b, 1, kPlainAccess, site);
  }
  begin_anew(block, offset, 16, stamp_of(warp));
  memcpy(ptr, value, 16);
}

// Makes `stamp` the writer of these bytes of `target`, checking that no other thread uses them.
void claim(Thread& thread, Block& target, uint32_t offset, int size, const Stamp& stamp, Site site) {
  stamp_of(thread);
  check_write(thread, target, offset, size, kPlainAccess, site);
  begin_anew(target, offset, size, static_cast<uint32_t>(machine.stamps.size()));
  machine.stamps.push_back(stamp);
}

// -- bulk copies --------------------------------------------------------------------------------------

namespace {

// Calls visit(begin, end) for the longest runs of bytes in the same state.
template <class Visit>
void for_runs(const Block& block, uint32_t offset, uint32_t size, Visit visit) {
  constexpr uint32_t kStep = 64;
  const ShadowByte* const shadow = block.shadow.data();
  for (uint32_t begin = offset, end; begin < offset + size; begin = end) {
    end = begin + 1;
    const auto alike = [&](uint32_t count) {
      return end + count <= offset + size && memcmp(shadow + end - 1, shadow + end, count * sizeof *shadow) == 0;
    };
    while (alike(kStep)) end += kStep;
    while (alike(1)) ++end;
    visit(begin, end);
  }
}

void check_async_order(const Thread& thread, uint32_t stamp, uint32_t offset, const char* verb, const char* other_verb,
                       Site site) {
  if (stamp == 0 || async_ordered(thread, machine.stamps[stamp])) return;
  const bool unfenced = ordered(thread, machine.stamps[stamp]);
  fault_race(thread, site, verb, offset, stamp, other_verb, unfenced ? "fence_proxy_async" : "barrier");
}

// The last writer of these bytes, and those who wrote them relaxed, come before what the async proxy does.
void check_async_after_writers(Thread& thread, const Block& block, uint32_t offset, const char* verb, Site site) {
  const ShadowByte& byte = block.shadow[offset];
  const Stamp::Kind kind = machine.stamps[byte.writer].kind;
  if (kind == Stamp::kMBarrier || kind == Stamp::kCopy || kind == Stamp::kAsync) {
    check_against_writer(thread, byte.writer, offset, kPlainAccess, verb, site);
  } else {
    check_async_order(thread, byte.writer, offset, verb, "wrote", site);
  }
  for (const uint32_t stamp : block.strong[byte.strong].writer) {
    check_async_order(thread, stamp, offset, verb, "writes relaxed or atomically", site);
  }
}

}  // namespace

// May the async proxy read 16 bytes on behalf of a whole warp?
void check_async_row(Warp& warp, uint32_t offset, Site site) {
  const Block& block = *warp.threads[0].block;
  const ShadowByte* const row = block.shadow.data() + offset;
  const bool alike = memcmp(row, row + 1, 15 * sizeof *row) == 0;
  for (uint32_t b = offset; b < offset + (alike ? 1 : 16); ++b) {
    const ShadowByte& byte = block.shadow[b];
    if (warp.async_passed.size() <= byte.writer) warp.async_passed.resize(machine.stamps.size());
    if (warp.async_passed[byte.writer] && byte.strong == 0) continue;
    Thread* const lanes = warp.threads;
    if (byte.writer == 0) fault(lanes[0], site, "wgmma reads shared byte %u, which was never written", b);
    for (int lane = 0; lane < 32; ++lane) check_async_after_writers(lanes[lane], block, b, "wgmma reads", site);
    warp.async_passed[byte.writer] = true;
  }
}

// Offset of a box of `size` bytes.
uint32_t box_offset(const Thread& thread, const void* ptr, uint64_t size, uint32_t alignment, Site site) {
  const int64_t offset = static_cast<const uint8_t*>(ptr) - thread.block->arena_start;
  const int64_t limit = static_cast<int64_t>(machine.launch.dynamic_smem);
  if (offset < 0 || offset + static_cast<int64_t>(size) > limit) {
    fault(thread, site, "a box of %llu bytes at offset %lld is not within dynamic shared memory, which has %lld bytes",
          static_cast<unsigned long long>(size), static_cast<long long>(offset), static_cast<long long>(limit));
  }
  if (offset % alignment != 0) {
    fault(thread, site, "a box misaligned: at offset %lld of dynamic shared memory, but it takes a multiple of %u",
          static_cast<long long>(offset), alignment);
  }
  if (machine.dynamic_alignment % static_cast<int>(alignment) != 0) {
    fault(thread, site, "a box that takes an address of a multiple of %u, but dynamic_smem was asked for %d", alignment,
          machine.dynamic_alignment);
  }
  return static_cast<uint32_t>(offset);
}

// Checks that all that was done with a box comes before a bulk load to it, and lets no thread use it before the
// AsyncPhase `phase` has landed.
void begin_bulk_load(Thread& thread, uint32_t offset, uint32_t size, int phase, Site site) {
  const char* const verb = "a bulk load writes";
  Block& block = *thread.block;
  const uint32_t writer = static_cast<uint32_t>(machine.stamps.size());
  machine.stamps.push_back(make_stamp(thread, Stamp::kAsync));
  machine.stamps.back().object = phase;
  check_not_stored_from(thread, block, offset, size, verb, site);
  check_readings(thread, block, offset, size, site);
  forget_readings(block, offset, size);
  for_runs(block, offset, size, [&](uint32_t begin, uint32_t end) {
    const ShadowByte& byte = block.shadow[begin];
    check_async_after_writers(thread, block, begin, verb, site);
    for (const uint32_t stamp : byte.reader) check_async_order(thread, stamp, begin, verb, "reads", site);
    for (const uint32_t stamp : block.strong[byte.strong].reader) {
      check_async_order(thread, stamp, begin, verb, "reads relaxed", site);
    }
    block.strong[byte.strong] = {};
    std::fill(block.shadow.data() + begin, block.shadow.data() + end, ShadowByte{writer, {0, 0}, byte.strong});
  });
}

// Checks that a bulk store may read these bytes from now on.
void check_bulk_store(Thread& thread, uint32_t offset, uint32_t size, Site site) {
  const char* const verb = "a bulk store reads";
  const Block& block = *thread.block;
  for_runs(block, offset, size, [&](uint32_t begin, uint32_t) {
    if (block.shadow[begin].writer == 0) fault(thread, site, "%s shared byte %u, which was never written", verb, begin);
    check_async_after_writers(thread, block, begin, verb, site);
  });
}

// The box has been read, as `thread` now knows.
void end_bulk_store(const Thread& thread, uint32_t offset, uint32_t size) {
  Block& block = *thread.block;
  const uint32_t reader = static_cast<uint32_t>(machine.stamps.size());
  machine.stamps.push_back(make_stamp(thread, Stamp::kBulkRead));
  for_runs(block, offset, size, [&](uint32_t begin, uint32_t end) {
    ShadowByte byte = block.shadow[begin];
    keep(thread, byte.reader, reader);
    std::fill(block.shadow.data() + begin, block.shadow.data() + end, byte);
  });
}

}  // namespace emu

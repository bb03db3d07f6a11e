// cp.async: bytes are taken and checked at once and land when their thread waits for them; until then no thread may
// touch their destination.
#include "state.hpp"

namespace emu {

const uint8_t* read_global(Thread& thread, uint64_t address, int size, int alignment, Site site);
uint32_t begin_copy(Thread& thread, void* ptr, Site site);
void land_copy(Thread& thread, const Copy& copy);

namespace {

CopyQueue& copies_of(const Thread& thread) { return machine.copies[&thread - machine.threads.data()]; }

}  // namespace

void cp_async_16(void* smem_ptr, const void* global_ptr, int src_bytes, Site site) {
  Thread& thread = running();
  check_arch(thread, 800, "cp_async_16", site);
  const uint64_t address = reinterpret_cast<uint64_t>(global_ptr);
  if (src_bytes < 0 || src_bytes > 16) fault(thread, site, "cp_async_16 of %d bytes", src_bytes);
  if (address % 16 != 0) {
    fault(thread, site, "16 bytes read misaligned: address 0x%llx", static_cast<unsigned long long>(address));
  }
  CopyQueue& queue = copies_of(thread);
  Copy copy = {};
  copy.source = src_bytes == 0 ? nullptr : read_global(thread, address, src_bytes, 16, site);
  copy.source_bytes = static_cast<uint8_t>(src_bytes);
  copy.offset = begin_copy(thread, smem_ptr, site);
  copy.group = queue.committed;
  copy.site = site;
  if (src_bytes != 0) memcpy(copy.bytes, copy.source, src_bytes);
  queue.copies.push_back(copy);
  const uint64_t place = place_of(thread, __builtin_frame_address(0));
  if (src_bytes != 0) log_access(thread, AccessSite::kGlobalCopy, place, address + src_bytes - 1, 16);
  log_access(thread, AccessSite::kShared, place, copy.offset, 16);
}

void cp_async_commit(Site site) {
  Thread& thread = running();
  check_arch(thread, 800, "cp_async_commit", site);
  ++copies_of(thread).committed;
}

void cp_async_wait(int pending, Site site) {
  Thread& thread = running();
  check_arch(thread, 800, "cp_async_wait", site);
  CopyQueue& queue = copies_of(thread);
  size_t landed = 0;
  for (; landed < queue.copies.size(); ++landed) {
    const Copy& copy = queue.copies[landed];
    if (static_cast<uint64_t>(copy.group) + pending >= queue.committed) break;
    if (copy.source_bytes != 0 && memcmp(copy.bytes, copy.source, copy.source_bytes) != 0) {
      fault(thread, copy.site, "the source of a cp.async was overwritten before it landed");
    }
    land_copy(thread, copy);
  }
  queue.copies.erase(queue.copies.begin(), queue.copies.begin() + static_cast<long>(landed));
}

void check_copies_landed(const Thread& thread) {
  const CopyQueue& queue = copies_of(thread);
  if (queue.copies.empty()) return;
  const Copy& copy = queue.copies.front();
  fault(thread, copy.site, "exited with %zu cp.async in flight that it never waited for, the first one %s",
        queue.copies.size(), copy.group < queue.committed ? "committed" : "not committed");
}

}  // namespace emu

// A kernel's own instructions noted instead of executed: included before it, this takes the place of the runtime's
// mbarriers, named barriers, bulk copies, matrices and wgmma. Nothing waits, nothing moves; an address in shared memory
// is what __cvta_generic_to_shared gives where dynamic shared memory begins at `trace_base`. What products leave in
// register r, so that words tell where they come from: scores r / -8, or r / -16 in a thread's second row; values r.
#pragma once

extern "C" void* realloc(void*, size_t) noexcept;

unsigned int trace_base;

inline unsigned int __cvta_generic_to_shared(const void* smem_ptr) {
  const char* const start = static_cast<const char*>(::emu::dynamic_smem(1024));
  return trace_base + static_cast<unsigned int>(static_cast<const char*>(smem_ptr) - start);
}

// The wrappers themselves, with every asm statement taken out: of these the descriptors are wanted, not their twins'.
#define asm
#define volatile(...)
namespace wrappers {
#include <../../cuda_src/ptx/wgmma.cuh>
}
#undef asm
#undef volatile

#include <ptx/wgmma.cuh>
static_assert(wrappers::ptx::kWgmmaUpper<128> == ptx::kWgmmaUpper<128> &&
                  wrappers::ptx::kWgmmaUpper<64> == ptx::kWgmmaUpper<64> &&
                  wrappers::ptx::kWgmmaUpper<32> == ptx::kWgmmaUpper<32>,
              "the twin of wgmma.cuh makes the same descriptors");

struct TraceEvent {
  const char *op, *file;
  int line, warp, lane;
  int time;  // twice the instructions of whole warps before, and one if this is one
  long long args[10];
};

TraceEvent* trace_events;
int trace_size, trace_room;
int trace_time[1024];  // of each thread

extern "C" void trace_start(unsigned int base) {
  trace_base = base;
  trace_size = 0;
  for (int& time : trace_time) time = 0;
}
extern "C" int trace_length() { return trace_size; }
extern "C" const TraceEvent* trace_data() { return trace_events; }

namespace emu {

enum class By { kLane, kEachLane, kWarp };  // who executes it; of kWarp, lane 0 speaks for all

template <class... Args>
void note(const char* op, By by, Site site, Args... args) {
  const int thread = static_cast<int>(threadIdx.x), time = 2 * trace_time[thread] + (by != By::kLane);
  if (by != By::kLane) ++trace_time[thread];
  if (by == By::kWarp && thread % 32 != 0) return;
  if (trace_size == trace_room) {
    trace_room = trace_room * 2 + 1024;
    trace_events = static_cast<TraceEvent*>(realloc(trace_events, trace_room * sizeof(TraceEvent)));
  }
  trace_events[trace_size++] = {
      op, site.file, site.line, thread / 32, thread % 32, time, {static_cast<long long>(args)...}};
}

void mbarrier_init(void* mbarrier, int arrivals, Site site) {
  note("init", By::kLane, site, __cvta_generic_to_shared(mbarrier), arrivals);
}
void fence_mbarrier_init(Site site) { note("init fence", By::kLane, site); }
void mbarrier_arrive(void* mbarrier, int bytes, Site site) {
  note("arrive", By::kLane, site, __cvta_generic_to_shared(mbarrier), bytes);
}
void mbarrier_wait(void* mbarrier, int parity, bool, Site site) {
  note("await", By::kLane, site, __cvta_generic_to_shared(mbarrier), parity);
}
int block_barrier(Combine, int value, Site site) {
  note("barrier sync", By::kWarp, site, 0, ::emu::block_dim.x);
  return value;
}
void named_barrier(int id, int threads, bool wait, Site site) {
  note(wait ? "barrier sync" : "barrier arrive", By::kWarp, site, id, threads);
}

// A map is known by its second word, the address of its tensor.
void cp_async_bulk_tensor_load(void* smem_ptr, const void* map, void* mbarrier, const int* c, Site site) {
  note("load", By::kLane, site, __cvta_generic_to_shared(smem_ptr), __cvta_generic_to_shared(mbarrier),
       static_cast<const unsigned long long*>(map)[1], c[0], c[1], c[2], c[3], c[4]);
}
void cp_async_bulk_tensor_store(const void* map, const void* smem_ptr, const int* c, Site site) {
  note("store", By::kLane, site, __cvta_generic_to_shared(smem_ptr), 0, static_cast<const unsigned long long*>(map)[1],
       c[0], c[1], c[2], c[3], c[4]);
}
void cp_async_bulk_commit(Site site) { note("commit stores", By::kLane, site); }
void cp_async_bulk_wait_read(int pending, Site site) { note("wait for stores", By::kLane, site, pending); }

void shared_store(void* ptr, const void*, int size, Site site) {
  note("write", By::kLane, site, __cvta_generic_to_shared(ptr), size);
}
void shared_load(const void* ptr, void* out, int size, Site site) {
  note("read", By::kLane, site, __cvta_generic_to_shared(ptr), size);
  memset(out, 0, size);
}
void stmatrix_x4(void* smem_ptr, const unsigned int* r, Site site) {
  note("stmatrix", By::kEachLane, site, __cvta_generic_to_shared(smem_ptr), r[0], r[1], r[2], r[3]);
}
void fence_proxy_async(Site site) { note("proxy fence", By::kWarp, site); }

unsigned int wgmma_descriptor(const void* smem_ptr, unsigned int pitch, Site) {
  return wrappers::ptx::wgmma_descriptor(smem_ptr, pitch);
}
void wgmma_fence(Site site) { note("fence", By::kWarp, site); }
void wgmma_commit(Site site) { note("commit", By::kWarp, site); }
void wgmma_wait(int pending, Site site) { note("wait", By::kWarp, site, pending); }
void wgmma(bool, int columns, float* d, const unsigned int* a_registers, unsigned int a, unsigned int b,
           unsigned int upper, bool accumulate, Site site, bool by_columns, unsigned int) {
  const bool shared = a_registers == nullptr;
  const unsigned int none[4] = {}, *const words = shared ? none : a_registers;
  note(by_columns ? "wgmma ss by columns"
       : shared   ? "wgmma ss"
                  : "wgmma rs",
       By::kWarp, site, columns, a, b, upper, accumulate, words[0], words[1], words[2], words[3]);
  for (int r = 0; r < columns / 2; ++r) d[r] = !shared ? r : r / (r / 2 % 2 == 0 ? -8.0f : -16.0f);
}

}  // namespace emu

// What kernel code sees of the emulator's runtime: plain functions, no standard headers, so that kernels build quickly.
#pragma once

namespace emu {

struct Dim3 {
  unsigned int x, y, z;
};

// Where kernel code called an instruction. As a default argument, `Site site = {__builtin_FILE(), __builtin_LINE()}`.
struct Site {
  const char* file;
  int line;
};

// The head of a thread's state: what threadIdx and blockIdx read.
struct ThreadHead {
  Dim3 thread_idx, block_idx;
  unsigned long long exp_calls;
};

extern ThreadHead* current;  // the thread that runs now
extern Dim3 block_dim, grid_dim;

// Global and shared memory. `out` and `value` are in the caller's own memory.
void global_load(const void* ptr, void* out, int size, Site site);
void global_load_coherent(const void* ptr, void* out, int size, Site site);  // of what other blocks wrote
void global_store(void* ptr, const void* value, int size, Site site);
void shared_load(const void* ptr, void* out, int size, Site site);
void shared_store(void* ptr, const void* value, int size, Site site);
void shared_load_relaxed(const void* ptr, void* out, int size, Site site);
void shared_store_relaxed(void* ptr, const void* value, int size, Site site);
void* atomic_target(void* ptr, int size, Site site);  // host address of a global or shared object
void* static_smem(const void* key, long long bytes);  // one allocation per key
void* dynamic_smem(int alignment);

// fma.rn: rounded once, whatever the compiler is allowed to do with plain products.
float fma_rn(float a, float b, float c);
double fma_rn(double a, double b, double c);

// Barriers of the block. `op` says what the block's values are combined to.
enum class Combine { kNone, kOr, kAnd, kCount };
int block_barrier(Combine op, int value, Site site);
void named_barrier(int id, int threads, bool wait, Site site);

// Of the block, among `count` of the launch. id > 0: by its first `threads` threads alone, with this named barrier.
bool arrive_is_last(void* counter, unsigned int count, int id, int threads, Site site);

// Warp collectives; every lane of `mask` calls the same one. Only kSync orders memory accesses.
enum class Collective {
  kSync,
  kShfl,
  kShflUp,
  kShflDown,
  kShflXor,
  kBallot,
  kReduceMax,
  kReduceMin,
  kReduceAdd,
  kElect,
  // Those of the tensor cores.
  kLdmatrix,
  kLdmatrixTrans,
  kStmatrix,
  kMmaHalf,
  kMmaBfloat16,
  kMmaTf32,
  kMmaDouble,
  // Those of warpgroups.
  kWgmma,
  kWgmmaFence,
  kWgmmaCommit,
  kWgmmaWait,
  kSetmaxnregDec,
  kSetmaxnregInc
};
unsigned long long warp_collective(Collective what, unsigned int mask, unsigned long long value, int lane_arg,
                                   int width, Site site);

bool elect_one(Site site);

// Asynchronous copies, matrices in shared memory, and what multiplies them.
void check_sm_80(const char* what, Site site);
void cp_async_16(void* smem_ptr, const void* global_ptr, int src_bytes, Site site);
void cp_async_commit(Site site);
void cp_async_wait(int pending, Site site);
void ldmatrix_x4(unsigned int* r, const void* smem_ptr, bool transposed, Site site);
void stmatrix_x4(void* smem_ptr, const unsigned int* r, Site site);
void mma(Collective what, float* d, const unsigned int* a, unsigned int b0, unsigned int b1, Site site);
void mma_f64(double* d, double a, double b, Site site);

// Clusters and mbarriers.
int cluster_rank(Site site);
void cluster_arrive(bool relaxed, Site site);
void cluster_wait(Site site);
unsigned int cluster_address(const void* smem_ptr, int cta_rank, Site site);
void st_async(void* smem_ptr, const void* value, int size, void* mbarrier, int cta_rank, Site site);
void mbarrier_init(void* mbarrier, int arrivals, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_arrive(void* mbarrier, int bytes, Site site);
void mbarrier_wait(void* mbarrier, int parity, bool of_cluster, Site site);

// Tiles by the Tensor Memory Accelerator; `c` are five coordinates.
void copy_tensor_map(unsigned long long* to, const unsigned long long* from);
void prefetch_tensormap(const void* map, Site site);
void cp_async_bulk_tensor_load(void* smem_ptr, const void* map, void* mbarrier, const int* c, Site site);
void cp_async_bulk_tensor_store(const void* map, const void* smem_ptr, const int* c, Site site);
void cp_async_bulk_commit(Site site);
void cp_async_bulk_wait_read(int pending, Site site);

// The async proxy, and warpgroups.
void fence_proxy_async(Site site);
unsigned int wgmma_descriptor(const void* smem_ptr, unsigned int pitch, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
void wgmma(bool half, int columns, float* d, const unsigned int* a_registers, unsigned int a, unsigned int b,
           unsigned int upper, bool accumulate, Site site, bool by_columns = false, unsigned int upper_a = 0);
void setmaxnreg_dec(int registers, Site site);
void setmaxnreg_inc(int registers, Site site);

// What the entry points of a compiled kernel are made of.
template <class Params>
constexpr unsigned long long params_size(void (*)(Params)) {
  return sizeof(Params);
}
template <class Params>
inline void call(void (*kernel)(Params), const void* params) {
  kernel(*static_cast<const Params*>(params));
}

}  // namespace emu

#define EMU_SITE ::emu::Site site = {__builtin_FILE(), __builtin_LINE()}

// What the decoder puts into Inst::fn of instructions that move data or synchronise, and the fields that each one
// reads. An address is (a, as, imm): see address_of(). A null handler: there is no such instruction.
#pragma once

#include "memory/access.hpp"

namespace soft {

// -- memory -------------------------------------------------------------------------------------------

// ld, ldu: x[0 .. vec) registers of ds bytes; space; flag 1: relaxed, acquire or volatile, 2: .nc. st the same with
// sources.
Handler load_handler(const std::string& type);
Handler store_handler(const std::string& type);
// atom, red: operation "add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"; d with ds = its size, or
// ds = 0 for red; b the operand, c that of cas; space; flag: GridOrderFlag.
Handler atomic_handler(const std::string& operation, const std::string& type);
void execute_fence(Warp& warp, const Inst& inst);                // membar, fence; flag: GridOrderFlag
void execute_fence_proxy_async(Warp& warp, const Inst& inst);    // fence.proxy.async
void execute_fence_mbarrier_init(Warp& warp, const Inst& inst);  // fence.mbarrier_init
void execute_trap(Warp& warp, const Inst& inst);                 // trap, brkpt
void execute_nothing(Warp& warp, const Inst& inst);              // prefetch, nanosleep, ...
void execute_setmaxnreg_dec(Warp& warp, const Inst& inst);       // imm

// -- warp instructions: kind = Collective, y[0] the register of the mask ------------------------------

// shfl: "up", "down", "bfly", "idx"; d, a, b, c; flag: e is the predicate.
Handler shuffle_handler(const std::string& mode);
// vote: d, predicate a; flag 0 all, 1 any, 2 uni, 3 ballot; + 8: a is negated.
void execute_vote(Warp& warp, const Inst& inst);
// match.any and match.all of size 4 or 8: d, a; flag: e is the predicate of match.all.
Handler match_handler(bool all, int size);
// redux: "add", "min", "max", "and", "or", "xor"; d, a.
Handler reduce_handler(const std::string& operation, const std::string& type);
void execute_elect(Warp& warp, const Inst& inst);       // d (ds = 0: none), predicate e
void execute_activemask(Warp& warp, const Inst& inst);  // d; of kind Normal

// -- matrices: kind = Collective, aligned, y[0] a constant of all lanes unless said otherwise ----------

void execute_ldmatrix(Warp& warp, const Inst& inst);  // x[0 .. vec); address; flag: .trans
void execute_stmatrix(Warp& warp, const Inst& inst);
// mma: x[0 .. 4) a, y[0 .. 4) b, y[4 .. 8) c, x[4 .. 8) d. "m16n8k16" of "f16" or "bf16", "m16n8k8" of "tf32" or the
// 16-bit types, "m8n8k4" of "f64".
Handler mma_handler(const std::string& shape, const std::string& type);
// wgmma.mma_async: imm = n; a the descriptor, or flag 2: x[0 .. 4) registers; b; predicate c (scale-d); flag 1: bf16,
// 4: b is MN-major; extra: number of the list of accumulators in Function::lists.
void execute_wgmma(Warp& warp, const Inst& inst);
void execute_wgmma_fence(Warp& warp, const Inst& inst);
void execute_wgmma_commit(Warp& warp, const Inst& inst);
void execute_wgmma_wait(Warp& warp, const Inst& inst);  // imm: groups that may be left

// -- asynchronous copies, mbarriers, clusters ---------------------------------------------------------

// cp.async: address in shared memory; b + source_imm in global memory; size; flag: c is the number of bytes to read.
void execute_cp_async(Warp& warp, const Inst& inst);
void execute_cp_async_commit(Warp& warp, const Inst& inst);
void execute_cp_async_wait(Warp& warp, const Inst& inst);  // imm: groups that may be left; -1: wait_all

// mbarrier: address; init: b the count; arrive: flag: b the bytes of expect_tx; try_wait and test_wait (.parity): d, b;
// of kind Yielding; order of arrive and the waits.
void execute_mbarrier_init(Warp& warp, const Inst& inst);
void execute_mbarrier_inval(Warp& warp, const Inst& inst);
void execute_mbarrier_arrive(Warp& warp, const Inst& inst);
void execute_mbarrier_expect(Warp& warp, const Inst& inst);  // expect_tx without an arrival: b
void execute_mbarrier_wait(Warp& warp, const Inst& inst);
// st.async: address; x[0 .. vec) of ds bytes; b the mbarrier.
void execute_st_async(Warp& warp, const Inst& inst);
void execute_mapa(Warp& warp, const Inst& inst);  // mapa.shared::cluster.u32 d, a, b
// cp.async.bulk.tensor: address in shared memory; b the map; x[0 .. vec) coordinates; flag: a load, c its mbarrier.
void execute_bulk_tensor(Warp& warp, const Inst& inst);
void execute_prefetch_tensormap(Warp& warp, const Inst& inst);  // b the map
void execute_bulk_commit(Warp& warp, const Inst& inst);
void execute_bulk_wait(Warp& warp, const Inst& inst);  // imm: groups that may be left

}  // namespace soft

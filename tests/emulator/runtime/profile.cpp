// Instruction cost of kernels built with -fsanitize-coverage=trace-pc: every basic block begins with a call of
// __sanitizer_cov_trace_pc. Until all lanes of a warp meet again, a block costs the warp as much as the lane that ran
// it most often.
#include "state.hpp"

#if defined(__linux__)

#include <link.h>

#include <algorithm>
#include <iterator>

namespace emu {

namespace {

constexpr uint32_t kRow = 33;  // a count for each lane, and whether the block is among blocks_run

#if defined(__x86_64__)
constexpr int kCallBytes = 5, kCallStep = 1;
#else
constexpr int kCallBytes = 4, kCallStep = 4;
#endif

// Where the call instruction at `code` goes; 0 if it is none.
uintptr_t call_target(const uint8_t* code) {
  const auto address = reinterpret_cast<uintptr_t>(code);
#if defined(__x86_64__)
  int32_t distance;
  memcpy(&distance, code + 1, sizeof distance);
  return *code == 0xe8 ? address + kCallBytes + static_cast<intptr_t>(distance) : 0;
#else
  uint32_t instruction;
  memcpy(&instruction, code, sizeof instruction);
  const auto distance = static_cast<int32_t>(instruction << 6) >> 4;
  return instruction >> 26 == 0x25 ? address + static_cast<intptr_t>(distance) : 0;
#endif
}

// Bytes up to the first return instruction.
uint32_t bytes_to_return(const uint8_t* code, uintptr_t size) {
#if defined(__x86_64__)
  const uint8_t instruction[] = {0xc3};
#else
  const uint8_t instruction[] = {0xc0, 0x03, 0x5f, 0xd6};
#endif
  const uint8_t* end = std::search(code, code + size, std::begin(instruction), std::end(instruction));
  return static_cast<uint32_t>(end - code);
}

// The basic blocks of a kernel library. Blocks lie in memory one after another, each behind its call.
struct Code {
  uintptr_t begin, size;
  std::vector<uint32_t> block;  // by the offset its call returns to; 0: no block
  std::vector<uint32_t> bytes;  // of each block, without the call
};

int find_code(dl_phdr_info* info, size_t, void* out) {
  Code& code = *static_cast<Code*>(out);
  const auto kernel = reinterpret_cast<uintptr_t>(machine.launch.kernel);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& segment = info->dlpi_phdr[i];
    if (segment.p_type != PT_LOAD || kernel - info->dlpi_addr - segment.p_vaddr >= segment.p_memsz) continue;
    code.begin = info->dlpi_addr + segment.p_vaddr;
    code.size = segment.p_memsz;
    return 1;
  }
  return 0;
}

// All calls go to one address, which is that of any of them.
Code read_code(uintptr_t returns_to) {
  Code code = {};
  dl_iterate_phdr(find_code, &code);
  const auto* bytes = reinterpret_cast<const uint8_t*>(code.begin);
  const uintptr_t target = call_target(reinterpret_cast<const uint8_t*>(returns_to) - kCallBytes);
  code.block.assign(code.size + 1, 0);
  code.bytes.assign(1, 0);
  uintptr_t last = 0;
  for (uintptr_t at = 0; target != 0 && at + kCallBytes <= code.size; at += kCallStep) {
    if (call_target(bytes + at) != target) continue;
    if (last != 0) code.bytes.back() = static_cast<uint32_t>(at - last);
    last = at + kCallBytes;
    code.block[last] = static_cast<uint32_t>(code.bytes.size());
    code.bytes.push_back(0);
  }
  // Other sections follow the last one.
  code.bytes.back() = bytes_to_return(bytes + last, code.size - last);
  return code;
}

std::map<void (*)(const void*), Code> codes;  // libraries stay loaded
const Code* code;                             // of the launch, once it ran a block
bool active;

}  // namespace

void begin_profile() {
  code = nullptr;
  active = true;
  for (Block& block : machine.blocks) {
    for (Warp& warp : block.warps) warp.block_counts.clear(), warp.blocks_run.clear();
  }
}

void end_profile() { active = false; }

void flush_profile(Warp& warp) {
  for (const uint32_t block : warp.blocks_run) {
    uint32_t* counts = warp.block_counts.data() + kRow * block;
    machine.counters.cost += static_cast<uint64_t>(code->bytes[block]) * *std::max_element(counts, counts + 32);
    memset(counts, 0, kRow * sizeof *counts);
  }
  warp.blocks_run.clear();
}

namespace {

void count_block(uintptr_t returns_to) {
  if (!active) return;  // a library's entry point runs outside launches, too
  const Thread& thread = running();
  if (!code) {
    auto found = codes.find(machine.launch.kernel);
    if (found == codes.end()) found = codes.emplace(machine.launch.kernel, read_code(returns_to)).first;
    code = &found->second;
  }
  const uintptr_t offset = returns_to - code->begin;
  const uint32_t block = offset <= code->size ? code->block[offset] : 0;
  if (block == 0) fault(thread, {nullptr, 0}, "its profile: a basic block begins with no known call");
  Warp& warp = *thread.warp;
  if (warp.block_counts.empty()) warp.block_counts.assign(kRow * code->bytes.size(), 0);
  uint32_t* counts = warp.block_counts.data() + kRow * block;
  ++counts[thread.lane];
  if (counts[32]) return;
  counts[32] = 1;
  warp.blocks_run.push_back(block);
}

}  // namespace

}  // namespace emu

extern "C" __attribute__((visibility("default"))) void __sanitizer_cov_trace_pc() {
  emu::count_block(reinterpret_cast<uintptr_t>(__builtin_return_address(0)));
}

#else

namespace emu {
void begin_profile() {}
void end_profile() {}
void flush_profile(Warp&) {}
}  // namespace emu

#endif

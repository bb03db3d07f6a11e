// Counting. What a sector and a wavefront are: CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory" and
// "Shared Memory and Memory Banks".
#include "execution/counters.hpp"

#include <algorithm>

#include "memory/access.hpp"

namespace soft {

Executed* executed;

namespace {

Counters totals;
bool on = false;
std::vector<Executed> executed_by_pc;
std::map<std::string, u32> opcode_numbers;
std::vector<Executed> executed_by_opcode;  // by number
enum class Class : u8 { kOther, kExponential, kCollective };
std::vector<Class> classes;  // by number
std::string table;

// 1, 2, 4, 8 and 16 bytes or more.
int size_class(u32 bytes) { return bytes >= 16 ? 4 : bytes >= 8 ? 3 : bytes >= 4 ? 2 : bytes >= 2 ? 1 : 0; }

u64 sectors(const AccessGroup& group, u32 bytes) {
  u64 sector[64];
  int count = 0;
  for (u32 rest = group.lanes; rest != 0; rest &= rest - 1) {
    const int lane = first_lane(rest);
    for (u64 s = group.address[lane] / 32; s <= (group.address[lane] + bytes - 1) / 32; ++s) {
      if (count == 0 || sector[count - 1] != s) sector[count++] = s;  // neighbours mostly share one
    }
  }
  std::sort(sector, sector + count);
  return static_cast<u64>(std::unique(sector, sector + count) - sector);
}

// "ld.global.v4.u32" of "@%p1 ld.global.v4.u32 {...}".
std::string opcode_of(const std::string& text) {
  size_t begin = 0;
  if (!text.empty() && text[0] == '@') begin = text.find_first_of(" \t") + 1;
  begin = text.find_first_not_of(" \t", begin);
  if (begin == std::string::npos) return "ret";
  return text.substr(begin, text.find_first_of(" \t;", begin) - begin);
}

Class class_of(const std::string& name) {
  if (name == "ex2") return Class::kExponential;
  const bool collective = name == "shfl" || name == "vote" || name == "match" || name == "redux";
  return collective ? Class::kCollective : Class::kOther;
}

u32 opcode_number(const std::string& opcode) {
  const auto [found, is_new] = opcode_numbers.insert({opcode, static_cast<u32>(executed_by_opcode.size())});
  if (is_new) {
    executed_by_opcode.push_back({});
    classes.push_back(class_of(opcode.substr(0, opcode.find('.'))));
  }
  return found->second;
}

}  // namespace

Counters& counters() { return totals; }
bool counting() { return on; }

void count_global(const AccessGroup& group, u32 bytes, bool write) {
  if (group.lanes == 0) return;
  const u64 all = static_cast<u64>(__builtin_popcount(group.lanes)) * bytes;
  ++totals.global_requests;
  (write ? totals.global_bytes_written : totals.global_bytes_read) += all;
  (write ? totals.global_sectors_written : totals.global_sectors_read) += sectors(group, bytes);
  ++(write ? totals.stores_by_size : totals.loads_by_size)[size_class(bytes)];
}

void count_global_copy(const AccessGroup& group, const u32* bytes) {
  if (group.lanes == 0) return;
  u32 largest = 1;
  for (u32 rest = group.lanes; rest != 0; rest &= rest - 1) {
    totals.global_bytes_read += bytes[first_lane(rest)];
    largest = std::max(largest, bytes[first_lane(rest)]);
  }
  ++totals.global_requests;
  totals.global_sectors_read += sectors(group, largest);
  ++totals.loads_by_size[4];
}

// Passes over shared memory: 32 banks of 4 bytes, one word per bank and pass; 8 bytes per lane go by half warps, 16 by
// quarters.
void count_shared(const AccessGroup& group, u32 bytes) {
  const int lanes_per_pass = bytes >= 16 ? 8 : bytes == 8 ? 16 : 32;
  for (int first = 0; first < 32; first += lanes_per_pass) {
    u64 word[32 * 4];
    int count = 0;
    for (int lane = first; lane < first + lanes_per_pass; ++lane) {
      if (!(group.lanes >> lane & 1)) continue;
      for (u32 byte = 0; byte < std::min(bytes, 16u); byte += 4) word[count++] = (group.address[lane] + byte) / 4;
    }
    if (count == 0) continue;
    std::sort(word, word + count);
    count = static_cast<int>(std::unique(word, word + count) - word);
    int words_in_bank[32] = {}, passes = 0;
    for (int i = 0; i < count; ++i) passes = std::max(passes, ++words_in_bank[word[i] % 32]);
    totals.shared_wavefronts += static_cast<u64>(passes);
    ++totals.shared_wavefronts_ideal;
  }
}

void begin_counting(const Function& function) {
  executed_by_pc.assign(function.code.size(), {});
  executed = executed_by_pc.data();
}

void end_counting(Function& function) {
  if (function.opcodes.empty()) {
    for (const Inst& inst : function.code) {
      const bool last = &inst == &function.code.back();
      function.opcodes.push_back(opcode_number(last ? "ret" : opcode_of(function.texts[inst.text])));
    }
  }
  for (size_t pc = 0; pc < executed_by_pc.size(); ++pc) {
    const Executed& here = executed_by_pc[pc];
    if (here.warps == 0) continue;
    Executed& sum = executed_by_opcode[function.opcodes[pc]];
    sum.warps += here.warps;
    sum.lanes += here.lanes;
    totals.warp_instructions += here.warps;
    totals.lane_instructions += here.lanes;
    const Class counted = classes[function.opcodes[pc]];
    if (counted == Class::kExponential) totals.exps += here.lanes;
    if (counted == Class::kCollective) totals.warp_collectives += here.warps;
  }
  executed_by_pc.clear();
}

}  // namespace soft

// -- for Python ---------------------------------------------------------------------------------------

#define API extern "C" __attribute__((visibility("default")))

// Returns whether it was on.
API int softCounting(int enable) {
  const bool before = soft::on;
  soft::on = enable != 0;
  return before;
}

API void softCounters(soft::Counters* out) { *out = soft::totals; }

// Lines of "opcode warp_instructions lane_instructions".
API const char* softOpcodes() {
  soft::table.clear();
  for (const auto& [opcode, number] : soft::opcode_numbers) {
    const soft::Executed& count = soft::executed_by_opcode[number];
    if (count.warps == 0) continue;
    soft::table += opcode + ' ' + std::to_string(count.warps) + ' ' + std::to_string(count.lanes) + '\n';
  }
  return soft::table.c_str();
}

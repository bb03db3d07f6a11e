// ld and st of all widths and spaces. PTX ISA, "Data Movement and Conversion Instructions: ld, st".
#include <algorithm>

#include "execution/counters.hpp"
#include "execution/grid_order.hpp"
#include "execution/handlers.hpp"
#include "memory/shadow.hpp"

namespace soft {

namespace {

// Addresses of all lanes, and where their bytes are for those of Warp::mask.
struct Lanes {
  u64 address[32];
  char* at[32];

  Lanes(Warp& warp, const Inst& inst, u32 bytes, Use use) {
    const u64 added = static_cast<u64>(inst.imm);
    if (inst.as == 0) {
      std::fill(address, address + 32, added);
    } else if (inst.as == 4) {
      for (int lane = 0; lane < 32; ++lane) address[lane] = R<u32>(warp, inst.a)[lane] + added;
    } else {
      for (int lane = 0; lane < 32; ++lane) address[lane] = R<u64>(warp, inst.a)[lane] + added;
    }
    locate_lanes(warp, inst, bytes, use, address, at);
    if (counting()) count(warp, inst, bytes, writes(use));
  }

 private:
  void count(const Warp& warp, const Inst& inst, u32 bytes, bool write) const {
    if (warp.mask == 0) return;
    AccessGroup group;
    group.lanes = warp.mask;
    std::copy(address, address + 32, group.address);
    const u64 any = address[first_lane(warp.mask)];
    if (inst.space == Global || (inst.space == Generic && any < kShared)) {
      count_global(group, bytes, write);
    } else if (inst.space == Shared || (inst.space == Generic && any < kLocal)) {
      count_shared(group, bytes);
    }
  }
};

// Result k of a load: a register wider than what is read gets the value extended.
template <class Value>
void extend(Warp& warp, const Inst& inst, u32 k, Value value) {
  using T = decltype(value(0));
  if (inst.ds == sizeof(T)) {
    each(warp, R<T>(warp, inst.x[k]), value);
  } else {
    lanes(warp, [&](int lane) {
      set_register(warp, inst.x[k], inst.ds, lane, static_cast<u64>(static_cast<s64>(value(lane))));
    });
  }
}

template <class T>
void load(Warp& warp, const Inst& inst) {
  constexpr u32 kSize = sizeof(T);
  const u32 bytes = kSize * inst.vec;
  const Use use = inst.flag == 2 ? Use::kReadOnly : inst.flag ? Use::kStrongRead : Use::kRead;
  if (inst.as == 0 && inst.space == ParamS) {  // one place, the same for all
    const char* from = locate(warp, inst, first_lane(warp.mask), static_cast<u64>(inst.imm), bytes, use);
    for (u32 k = 0; k < inst.vec; ++k, from += kSize) {
      T value;
      memcpy(&value, from, kSize);
      extend(warp, inst, k, [=](int) { return value; });
    }
    return;
  }
  const Lanes from(warp, inst, bytes, use);  // all of them first: a register of the address may be among the results
  for (u32 k = 0; k < inst.vec; ++k) {
    extend(warp, inst, k, [&](int lane) {
      T value;
      memcpy(&value, from.at[lane] + kSize * k, kSize);
      return value;
    });
  }
}

template <class T>
void store(Warp& warp, const Inst& inst) {
  constexpr u32 kSize = sizeof(T);
  const Lanes to(warp, inst, kSize * inst.vec, inst.flag ? Use::kStrongWrite : Use::kWrite);
  for (u32 k = 0; k < inst.vec; ++k) {
    const u32 offset = inst.x[k];
    lanes(warp, [&](int lane) {
      const T value =
          inst.ds == kSize ? R<T>(warp, offset)[lane] : static_cast<T>(get_register(warp, offset, inst.ds, lane));
      memcpy(to.at[lane] + kSize * k, &value, kSize);
    });
  }
}

}  // namespace

Handler load_handler(const std::string& type) {
  static const std::map<std::string, Handler> handlers = {
      {"u8", load<u8>},   {"b8", load<u8>},   {"s8", load<s8>},    {"u16", load<u16>},
      {"b16", load<u16>}, {"f16", load<u16>}, {"bf16", load<u16>}, {"s16", load<s16>},
      {"u32", load<u32>}, {"b32", load<u32>}, {"f32", load<u32>},  {"s32", load<s32>},
      {"u64", load<u64>}, {"b64", load<u64>}, {"f64", load<u64>},  {"s64", load<s64>}};
  const auto found = handlers.find(type);
  return found == handlers.end() ? nullptr : found->second;
}

Handler store_handler(const std::string& type) {
  const size_t digits = type.find_first_of("0123456789");
  if (digits == std::string::npos) return nullptr;
  switch (atoi(type.c_str() + digits)) {
    case 8:
      return store<u8>;
    case 16:
      return store<u16>;
    case 32:
      return store<u32>;
    case 64:
      return store<u64>;
    default:
      return nullptr;
  }
}

// membar and fence order the block's warps that execute them with one another; grid_order.cpp orders blocks.
void execute_fence(Warp& warp, const Inst& inst) {
  VectorClock& fences = warp.block->state->fences;
  acquire(warp, fences);
  order_fence(warp, inst);
  release(warp, fences);
  order_lanes(warp, warp.live);
}

void fence_mbarriers(Warp& warp);  // bulk/mbarrier.cpp

void execute_fence_proxy_async(Warp& warp, const Inst&) {
  fence_async_proxy(warp);
  fence_mbarriers(warp);
}

void execute_trap(Warp& warp, const Inst& inst) { fault(warp, inst, first_lane(warp.mask), "trap"); }

void execute_nothing(Warp&, const Inst&) {}

}  // namespace soft

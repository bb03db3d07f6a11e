// shfl, vote, match, redux, elect, activemask. All lanes of the mask are here (execution/warp.cpp). PTX ISA, "Data
// Movement and Conversion Instructions: shfl.sync", "Parallel Synchronization and Communication Instructions".
#include <algorithm>

#include "execution/handlers.hpp"

namespace soft {

namespace {

enum class Shuffle { kUp, kDown, kButterfly, kIndex };

// c holds the last lane of a segment in its lower bits, and from bit 8 on which bits of a lane number its segment is.
template <Shuffle kMode>
void shuffle(Warp& warp, const Inst& inst) {
  u32 value[32], result[32], in_range = 0;
  memcpy(value, R<u32>(warp, inst.a), sizeof value);
  lanes(warp, [&](int lane) {
    const u32 argument = R<u32>(warp, inst.b)[lane] & 31, control = R<u32>(warp, inst.c)[lane];
    const u32 clamp = control & 31, segment = control >> 8 & 31, me = static_cast<u32>(lane);
    const int last = static_cast<int>((me & segment) | (clamp & ~segment));
    int source;
    bool inside;
    if constexpr (kMode == Shuffle::kUp) {
      source = lane - static_cast<int>(argument);
      inside = source >= last;
    } else if constexpr (kMode == Shuffle::kDown) {
      source = lane + static_cast<int>(argument);
      inside = source <= last;
    } else if constexpr (kMode == Shuffle::kButterfly) {
      source = static_cast<int>(me ^ argument);
      inside = source <= last;
    } else {
      source = static_cast<int>((me & segment) | (argument & ~segment));
      inside = source <= last;
    }
    if (!inside) source = lane;
    if (__builtin_expect(!(warp.mask >> source & 1), 0)) {
      fault(warp, inst, lane, "shuffle reads lane %d, which is not in the mask or has exited", source);
    }
    result[lane] = value[source];
    in_range |= static_cast<u32>(inside) << lane;
  });
  lanes(warp, [&](int lane) { R<u32>(warp, inst.d)[lane] = result[lane]; });
  if (inst.flag) set_predicate(warp, inst.e, in_range);
}

template <class T>
void match_any(Warp& warp, const Inst& inst) {
  const T* const value = R<T>(warp, inst.a);
  u32 result[32];
  lanes(warp, [&](int lane) {
    result[lane] = 0;
    lanes(warp, [&](int other) { result[lane] |= static_cast<u32>(value[other] == value[lane]) << other; });
  });
  lanes(warp, [&](int lane) { R<u32>(warp, inst.d)[lane] = result[lane]; });
}

template <class T>
void match_all(Warp& warp, const Inst& inst) {
  const T* const value = R<T>(warp, inst.a);
  bool alike = true;
  lanes(warp, [&](int lane) { alike &= value[lane] == value[first_lane(warp.mask)]; });
  const u32 result = alike ? warp.mask : 0;
  lanes(warp, [&](int lane) { R<u32>(warp, inst.d)[lane] = result; });
  if (inst.flag) set_predicate(warp, inst.e, alike ? ~0u : 0);
}

template <class T, class Combine>
void reduce(Warp& warp, const Inst& inst, Combine combine) {
  const T* const value = R<T>(warp, inst.a);
  T result = value[first_lane(warp.mask)];
  for (u32 rest = warp.mask & (warp.mask - 1); rest != 0; rest &= rest - 1) {
    result = combine(result, value[first_lane(rest)]);
  }
  lanes(warp, [&](int lane) { R<T>(warp, inst.d)[lane] = result; });
}

template <class T>
void reduce_add(Warp& warp, const Inst& inst) {
  reduce<T>(warp, inst, [](T a, T b) { return a + b; });
}
template <class T>
void reduce_min(Warp& warp, const Inst& inst) {
  reduce<T>(warp, inst, [](T a, T b) { return std::min(a, b); });
}
template <class T>
void reduce_max(Warp& warp, const Inst& inst) {
  reduce<T>(warp, inst, [](T a, T b) { return std::max(a, b); });
}
void reduce_and(Warp& warp, const Inst& inst) {
  reduce<u32>(warp, inst, [](u32 a, u32 b) { return a & b; });
}
void reduce_or(Warp& warp, const Inst& inst) {
  reduce<u32>(warp, inst, [](u32 a, u32 b) { return a | b; });
}
void reduce_xor(Warp& warp, const Inst& inst) {
  reduce<u32>(warp, inst, [](u32 a, u32 b) { return a ^ b; });
}

}  // namespace

Handler shuffle_handler(const std::string& mode) {
  if (mode == "up") return shuffle<Shuffle::kUp>;
  if (mode == "down") return shuffle<Shuffle::kDown>;
  if (mode == "bfly") return shuffle<Shuffle::kButterfly>;
  return mode == "idx" ? shuffle<Shuffle::kIndex> : nullptr;
}

Handler match_handler(bool all, int size) {
  if (all) return size == 4 ? match_all<u32> : match_all<u64>;
  return size == 4 ? match_any<u32> : match_any<u64>;
}

Handler reduce_handler(const std::string& operation, const std::string& type) {
  const bool is_signed = type == "s32";
  if (operation == "add") return reduce_add<u32>;
  if (operation == "min") return is_signed ? reduce_min<s32> : reduce_min<u32>;
  if (operation == "max") return is_signed ? reduce_max<s32> : reduce_max<u32>;
  if (operation == "and") return reduce_and;
  if (operation == "or") return reduce_or;
  return operation == "xor" ? reduce_xor : nullptr;
}

void execute_vote(Warp& warp, const Inst& inst) {
  u32 votes = *R<u32>(warp, inst.a);
  if (inst.flag & 8) votes = ~votes;
  votes &= warp.mask;
  const int mode = inst.flag & 7;
  if (mode == 3) {
    lanes(warp, [&](int lane) { R<u32>(warp, inst.d)[lane] = votes; });
    return;
  }
  const bool all = votes == warp.mask, none = votes == 0;
  const bool result = mode == 0 ? all : mode == 1 ? !none : all || none;
  set_predicate(warp, inst.d, result ? ~0u : 0);
}

// The elected lane is the first; which one it is, the ISA leaves open.
void execute_elect(Warp& warp, const Inst& inst) {
  const int elected = first_lane(warp.mask);
  if (inst.ds) lanes(warp, [&](int lane) { R<u32>(warp, inst.d)[lane] = static_cast<u32>(elected); });
  set_predicate(warp, inst.e, 1u << elected);
}

void execute_activemask(Warp& warp, const Inst& inst) {
  const u32 mask = warp.mask;
  lanes(warp, [&](int lane) { R<u32>(warp, inst.d)[lane] = mask; });
}

}  // namespace soft

// The checks of shared memory. A word of four bytes has one entry; accesses to different bytes of a word never
// conflict, but only the last writer of a word is remembered, with the lane that wrote each byte.
#include "memory/shadow.hpp"

#include <algorithm>

namespace soft {

namespace {

// Calls visit(word, bytes, offset) for the words of a range, `bytes` the bits of the touched bytes.
template <class Visit>
void for_words(Block& block, u32 offset, u32 bytes, Visit visit) {
  std::vector<ShadowWord>& words = block.state->shadow->words;
  const u32 end = offset + bytes;
  if (offset % 4 == 0 && bytes % 4 == 0) {
    for (u32 at = offset; at < end; at += 4) visit(words[at / 4], 15u, at);
    return;
  }
  for (u32 at = offset / 4 * 4; at < end; at += 4) {
    const u32 first = at < offset ? offset - at : 0, last = std::min(end - at, 4u);
    visit(words[at / 4], (1u << last) - (1u << first), std::max(at, offset));
  }
}

[[noreturn]] void fault_race(const Warp& warp, const Inst& inst, int lane, const char* verb, u32 offset, Stamp other,
                             const char* other_verb, const char* missing) {
  const u32 warps = static_cast<u32>(warp.block->warps.size()), number = warp_of(other);
  fault(warp, inst, lane, "race in shared memory: %s byte %u, which warp %u of block rank %u %s, with no %s between",
        verb, offset, number % warps, number / warps, other_verb, missing);
}

// What no ordinary access may touch.
void check_special(const Warp& warp, const Inst& inst, int lane, const char* verb, u32 offset, Stamp writer) {
  if (kind_of(writer) == StampKind::kMBarrier) {
    fault(warp, inst, lane, "%s shared byte %u, which is part of an mbarrier", verb, offset);
  }
  if (kind_of(writer) != StampKind::kInFlight) return;
  const u32 flight = clock_of(writer), warps = static_cast<u32>(warp.block->warps.size());
  fault(warp, inst, lane, "%s shared byte %u, to which %s of warp %u is still in flight", verb, offset,
        flight == kCpAsync    ? "a cp.async"
        : flight == kBulkLoad ? "a bulk load"
                              : "an st.async",
        warp_of(writer) % warps);
}

bool conflicts(const Warp& warp, Stamp stamp, Strength strength) {
  if (stamp == 0 || ordered(warp, stamp)) return false;
  return strength == Strength::kWeak || kind_of(stamp) != StampKind::kStrong;
}

int lane_of_byte(u32 lanes, u32 byte) { return static_cast<int>(lanes >> 8 * byte & 0xff); }

// The same between the lanes of one warp. CuPy's kernels may rely on lanes that keep step.
void check_lanes(const Warp& warp, const Inst& inst, int lane, const char* verb, u32 offset, u32 bytes, Stamp stamp,
                 u32 earlier_lanes, const char* earlier_verb, Strength strength) {
  if (warp_of(stamp) != warp_number(warp) || clock_of(stamp) < warp.state->lanes_ordered) return;
  const bool strong = strength == Strength::kStrong && kind_of(stamp) == StampKind::kStrong;
  if (stamp == 0 || strong || kind_of(stamp) > StampKind::kStrong || is_lenient(*warp.f)) return;
  for (u32 byte = 0; byte < 4; ++byte) {
    const int earlier = lane_of_byte(earlier_lanes, byte);
    if (!(bytes >> byte & 1) || lanes_ordered(warp, lane_of(inst, lane), earlier, stamp)) continue;
    const std::string who = earlier == kAllOfThem ? "lanes" : "lane " + std::to_string(earlier);
    fault(warp, inst, lane, "race in shared memory: %s byte %u, which %s of its warp %s, with no __syncwarp() between",
          verb, offset / 4 * 4 + byte, who.c_str(), earlier_verb);
  }
}

const char* missing_for(Stamp stamp) {
  return kind_of(stamp) == StampKind::kAsync ? "wait on its mbarrier" : "barrier";
}

}  // namespace

void begin_shadow(Block& block) {
  std::vector<ShadowWord>& words = block.state->shadow->words;
  words.resize(block.smem.size() / 4 + 1);
  memset(static_cast<void*>(words.data()), 0, words.size() * sizeof(ShadowWord));
  if (is_lenient(*block.f)) {
    for (ShadowWord& word : words) word.written = 15;
    return;
  }
  // Compilers widen loads into the padding behind an array, and drop what they find there.
  u32 end = 0;
  const auto forgive = [&](u32 begin) {
    for (; end < begin; ++end) words[end / 4].written = static_cast<u8>(words[end / 4].written | 1u << end % 4);
  };
  for (const auto& [offset, bytes] : block.f->shared_arrays) {
    forgive(offset);
    end = offset + bytes;
  }
  forgive(std::min(static_end(*block.f), static_cast<u32>(block.smem.size())));
}

void check_shared_read(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes, Strength strength) {
  const Stamp me = stamp_of(warp, strength == Strength::kStrong ? StampKind::kStrong : StampKind::kPlain);
  const u32 mine = static_cast<u32>(lane) * kEachByte;
  const QuickAccess access(warp, strength);
  for_words(block, offset, bytes, [&](ShadowWord& word, u32 touched, u32 at) {
    if (word.writer != me || word.writer_lanes != mine || (word.written & touched) != touched) {
      if (word.writer_bytes & touched) check_special(warp, inst, lane, "reads", at, word.writer);
      if ((word.written & touched) != touched) {
        fault(warp, inst, lane, "reads shared byte %u, which was never written", at);
      }
      if ((word.writer_bytes & touched) && conflicts(warp, word.writer, strength)) {
        fault_race(warp, inst, lane, "reads", at, word.writer, "wrote", missing_for(word.writer));
      }
      check_lanes(warp, inst, lane, "reads", at, word.writer_bytes & touched, word.writer, word.writer_lanes, "wrote",
                  strength);
    }
    access.keep_reader(word, touched, lane_of(inst, lane));
  });
}

static void check_write(Warp& warp, const Inst& inst, int lane, const char* verb, ShadowWord& word, u32 touched, u32 at,
                        Strength strength) {
  if (word.writer_bytes & touched) {
    check_special(warp, inst, lane, verb, at, word.writer);
    if (conflicts(warp, word.writer, strength)) {
      fault_race(warp, inst, lane, verb, at, word.writer, "wrote", missing_for(word.writer));
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (!(word.reader_bytes[i] & touched)) continue;
    if (conflicts(warp, word.reader[i], strength)) {
      fault_race(warp, inst, lane, verb, at, word.reader[i], "reads", "barrier");
    }
    check_lanes(warp, inst, lane, verb, at, word.reader_bytes[i] & touched, word.reader[i], word.reader_lanes[i],
                "read", strength);
  }
}

void check_shared_write(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes,
                        Strength strength) {
  const Stamp me = stamp_of(warp, strength == Strength::kStrong ? StampKind::kStrong : StampKind::kPlain);
  for_words(block, offset, bytes, [&](ShadowWord& word, u32 touched, u32 at) {
    if (word.writer != me || word.reader_bytes[0] || word.reader_bytes[1]) {
      check_write(warp, inst, lane, "writes", word, touched, at, strength);
    }
    begin_write(word, me, touched, lane_of(inst, lane));
  });
}

// -- the async proxy ----------------------------------------------------------------------------------

void check_async_read(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes, const char* verb) {
  Stamp checked = 0;
  for_words(block, offset, bytes, [&](ShadowWord& word, u32 touched, u32 at) {
    if ((word.written & touched) != touched) {
      if (word.writer_bytes & touched) check_special(warp, inst, lane, verb, at, word.writer);
      fault(warp, inst, lane, "%s shared byte %u, which was never written", verb, at);
    }
    if (word.writer == checked) return;
    check_special(warp, inst, lane, verb, at, word.writer);
    if (!async_ordered(warp, word.writer)) {
      const bool unfenced = ordered(warp, word.writer);
      fault_race(warp, inst, lane, verb, at, word.writer, "wrote",
                 unfenced ? "fence.proxy.async" : missing_for(word.writer));
    }
    checked = word.writer;
  });
}

void record_async_read(Warp& warp, Block& block, u32 offset, u32 bytes) {
  const QuickAccess access(warp, Strength::kWeak);
  for_words(block, offset, bytes,
            [&](ShadowWord& word, u32 touched, u32) { access.keep_reader(word, touched, kNotKnown); });
}

// Bytes that the async proxy writes must not have been written by ordinary stores without a proxy fence since.
void begin_flight(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes, Stamp flight,
                  bool by_async_proxy) {
  const char* const verb = clock_of(flight) == kCpAsync   ? "cp.async writes"
                           : clock_of(flight) == kStAsync ? "st.async writes"
                                                          : "a bulk load writes";
  for_words(block, offset, bytes, [&](ShadowWord& word, u32 touched, u32 at) {
    check_write(warp, inst, lane, verb, word, touched, at, Strength::kWeak);
    const bool written = (word.writer_bytes & touched) && word.writer != 0;
    if (by_async_proxy && written && !async_ordered(warp, word.writer)) {
      fault_race(warp, inst, lane, verb, at, word.writer, "wrote", "fence.proxy.async");
    }
    begin_write(word, flight, touched);
    word.written = static_cast<u8>(word.written & ~touched);
  });
}

void end_flight(Block& block, u32 offset, u32 bytes, Stamp stamp, int lane) {
  for_words(block, offset, bytes, [&](ShadowWord& word, u32 touched, u32) { begin_write(word, stamp, touched, lane); });
}

// -- mbarriers ----------------------------------------------------------------------------------------

void make_mbarrier(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset) {
  for_words(block, offset, 8, [&](ShadowWord& word, u32 touched, u32 at) {
    check_write(warp, inst, lane, "mbarrier.init writes", word, touched, at, Strength::kWeak);
    begin_write(word, stamp_of(warp, StampKind::kMBarrier), touched);
  });
}

void unmake_mbarrier(Block& block, u32 offset) {
  for_words(block, offset, 8, [&](ShadowWord& word, u32, u32) { word = {}; });
}

}  // namespace soft

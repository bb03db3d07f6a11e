// What is known of each word of shared memory: who last wrote it, who reads it, which of its bytes have a value. Finds
// reads of what nobody wrote, races between warps and between the lanes of one, and uses of bytes that an asynchronous
// copy has in flight.
#pragma once

#include "execution/state.hpp"

namespace soft {

struct ShadowWord {
  Stamp writer;     // the last one
  Stamp reader[2];  // of two different warps
  u8 written;       // bytes that have a value
  u8 writer_bytes, reader_bytes[2];
  u32 writer_lanes, reader_lanes[2];  // of each byte in 8 bits: a lane, or one of Lanes
};

struct SharedShadow {
  std::vector<ShadowWord> words;
};

constexpr u32 kEachByte = 0x01010101;

inline void begin_write(ShadowWord& word, Stamp stamp, u32 bytes, int lane = kNotKnown) {
  u32 mask = ~0u;
  if (bytes != 15) {
    mask = 0;
    for (u32 byte = 0; byte < 4; ++byte) mask |= (bytes >> byte & 1) * (0xffu << 8 * byte);
  }
  word.writer_lanes = (word.writer_lanes & ~mask) | (static_cast<u32>(lane) * kEachByte & mask);
  const u32 merged = word.writer == stamp ? word.writer_bytes | bytes : bytes;
  for (u8& of_reader : word.reader_bytes) of_reader = static_cast<u8>(of_reader & ~bytes);
  word.writer = stamp;
  word.writer_bytes = static_cast<u8>(merged);
  word.written = static_cast<u8>(word.written | bytes);
}

// Matrices are loaded and stored by all lanes together.
inline int lane_of(const Inst& inst, int lane) { return inst.kind == Collective ? kAllOfThem : lane; }

enum class Strength { kWeak, kStrong };  // a relaxed or atomic access is strong: two of them never race

void begin_shadow(Block& block);
// `verb` is for the message: "reads", "wgmma reads".
void check_shared_read(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes, Strength strength);
void check_shared_write(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes, Strength strength);
// By the async proxy on behalf of the warp: wgmma, and bulk stores.
void check_async_read(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes, const char* verb);
void record_async_read(Warp& warp, Block& block, u32 offset, u32 bytes);
// A copy to these bytes begins: nobody may use them until it has landed, with `stamp`.
void begin_flight(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset, u32 bytes, Stamp flight,
                  bool by_async_proxy);
void end_flight(Block& block, u32 offset, u32 bytes, Stamp stamp, int lane = kNotKnown);
void make_mbarrier(Warp& warp, const Inst& inst, int lane, Block& block, u32 offset);
void unmake_mbarrier(Block& block, u32 offset);

// Accesses of a warp to shared memory of its own block that pass every check at a glance, which are nearly all: the
// bytes lie inside, and all that was done with them comes before. Of the others nothing is said; the functions above
// do.
class QuickAccess {
 public:
  QuickAccess(const Warp& warp, Strength strength)
      : words_(warp.block->state->shadow->words.data()),
        bytes_(warp.block->smem.data()),
        known_(warp.state->known.data()),
        number_(warp_number(warp)),
        lanes_ordered_(warp.state->lanes_ordered),
        several_(warp.state->pairs.empty() ? kAllOfThem * kEachByte : ~0u),
        size_(warp.block->smem.size()),
        static_end_(static_end(*warp.f)),
        dynamic_begin_(warp.f->dynamic_begin),
        me_(stamp_of(warp, strength == Strength::kStrong ? StampKind::kStrong : StampKind::kPlain)) {}

  char* read(int lane, u32 offset, u32 bytes) const {
    return for_words(offset, bytes, [this, lane](ShadowWord& word, u32 touched) {
      const u32 mine = static_cast<u32>(lane) * kEachByte;
      // The lane has read them before, or two others, which is as good. A write since would have cleared their bits.
      const int slot = word.reader[0] == me_ ? 0 : 1;
      const u32 lanes = word.reader_lanes[slot];
      if (word.reader[slot] == me_ && (lanes == mine || lanes == several_) &&
          (word.reader_bytes[slot] & touched) == touched) {
        return true;
      }
      if ((word.written & touched) != touched || !is_before(word.writer, word.writer_lanes, mine)) return false;
      keep_reader(word, touched, lane);
      return true;
    });
  }
  char* write(int lane, u32 offset, u32 bytes) const {
    return for_words(offset, bytes, [this, lane](ShadowWord& word, u32 touched) {
      const u32 mine = static_cast<u32>(lane) * kEachByte;
      if (!is_before(word.writer)) return false;
      for (int k = 0; k < 2; ++k) {
        if ((word.reader_bytes[k] & touched) && !is_before(word.reader[k], word.reader_lanes[k], mine)) return false;
      }
      begin_write(word, me_, touched, lane);
      return true;
    });
  }

  // Keeps the readers of two warps: a later writer is of another warp than one of them at least.
  void keep_reader(ShadowWord& word, u32 bytes, int lane) const {
    const int slot = is_before(word.reader[0]) ? 0 : 1;
    const u32 before = word.reader[slot] == me_ ? word.reader_bytes[slot] : 0;
    word.reader[slot] = me_;
    word.reader_bytes[slot] = static_cast<u8>(before | bytes);
    u32& kept = word.reader_lanes[slot];
    const u32 mine = static_cast<u32>(lane) * kEachByte;
    if (before == 0) kept = mine;
    if (kept == mine) return;
    if ((before & bytes) == 15) {  // each byte that another lane has read has been read by several
      const u32 others = ((kept ^ mine) + 0x7f * kEachByte) & 0x80 * kEachByte, mask = (others >> 7) * 0xff;
      kept = (kept & ~mask) | (kAllOfThem * kEachByte & mask);
      return;
    }
    for (u32 byte = 0; byte < 4; ++byte) {
      if (!(bytes >> byte & 1)) continue;
      const u32 earlier = kept >> 8 * byte & 0xff, me = static_cast<u32>(lane);
      const u32 now = before >> byte & 1 && earlier != me ? static_cast<u32>(kAllOfThem) : me;
      kept = (kept & ~(0xffu << 8 * byte)) | now << 8 * byte;
    }
  }

 private:
  // By the warp itself, or known to it; and nothing in flight, nor an mbarrier.
  bool is_before(Stamp stamp) const {
    return stamp < make_stamp(StampKind::kInFlight, 0, 0) && known_[warp_of(stamp)] >= clock_of(stamp);
  }
  // And of another warp, before a barrier of all lanes, or by the lane itself.
  bool is_before(Stamp stamp, u32 lanes, u32 mine) const {
    const bool lanes_ordered = lanes == mine || warp_of(stamp) != number_ || clock_of(stamp) < lanes_ordered_;
    return is_before(stamp) && (lanes_ordered || stamp == 0);
  }

  template <class Check>
  char* for_words(u32 offset, u32 bytes, Check check) const {
    const u64 end = u64(offset) + bytes;
    if (end > size_ || (end > static_end_ && offset < dynamic_begin_) || (offset & (bytes - 1)) != 0) return nullptr;
    ShadowWord* word = words_ + offset / 4;
    bool passes = true;
    if (bytes < 4) {
      passes = check(*word, ((1u << bytes) - 1) << offset % 4);
    } else {
      for (u32 n = bytes / 4; n != 0 && passes; --n) passes = check(*word++, 15u);
    }
    return passes ? bytes_ + offset : nullptr;
  }

  ShadowWord* words_;
  char* bytes_;
  const u32* known_;
  u32 number_, lanes_ordered_;
  u32 several_;  // readers that tell of every lane: not where some pairs of lanes are ordered and others are not
  u64 size_;
  u32 static_end_, dynamic_begin_;
  Stamp me_;
};

// What is in flight, in the clock of a stamp of kind kInFlight.
enum Flight : u32 { kCpAsync = 1, kBulkLoad, kStAsync };
inline Stamp flight_stamp(const Warp& warp, Flight what) {
  return make_stamp(StampKind::kInFlight, warp_number(warp), what);
}

}  // namespace soft

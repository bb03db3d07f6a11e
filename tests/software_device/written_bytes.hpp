// Which bytes of an allocation have a value: a bit for each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace soft {

// Exists as long as a byte of its allocation has never been written.
class WrittenBytes {
 public:
  explicit WrittenBytes(uint64_t bytes)
      : missing_(bytes), words_(static_cast<uint64_t*>(calloc(bytes / 64 + 2, sizeof(uint64_t)))) {
    if (!words_) throw std::bad_alloc();
  }

  // Bytes that have no value.
  uint64_t missing() const { return missing_; }

  // The state of up to 64 bytes, the first one in bit 0.
  uint64_t get(uint64_t offset, uint64_t bytes) const {
    const uint64_t word = offset / 64, shift = offset % 64;
    uint64_t bits = words_[word] >> shift;
    if (shift + bytes > 64) bits |= words_[word + 1] << (64 - shift);
    return bits & ones(bytes);
  }

  bool all(uint64_t offset, uint64_t bytes) const {
    return bytes <= 64 ? get(offset, bytes) == ones(bytes) : all_of_many(offset, bytes);
  }

  // Gives up to 64 bytes this state.
  void put(uint64_t offset, uint64_t bytes, uint64_t bits) {
    const uint64_t word = offset / 64, shift = offset % 64;
    put_in_word(word, ones(bytes) << shift, bits << shift);
    if (shift + bytes > 64) put_in_word(word + 1, ones(bytes) >> (64 - shift), bits >> (64 - shift));
  }

  // They have been written.
  void write(uint64_t offset, uint64_t bytes) {
    for (; bytes > 64; offset += 64, bytes -= 64) put(offset, 64, ones(64));
    put(offset, bytes, ones(bytes));
  }

 private:
  struct Free {
    void operator()(uint64_t* words) const { free(words); }
  };

  static uint64_t ones(uint64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

  bool all_of_many(uint64_t offset, uint64_t bytes) const {
    for (; bytes > 64; offset += 64, bytes -= 64) {
      if (get(offset, 64) != ones(64)) return false;
    }
    return get(offset, bytes) == ones(bytes);
  }

  void put_in_word(uint64_t word, uint64_t mask, uint64_t bits) {
    const uint64_t before = words_[word] & mask, after = bits & mask;
    if (before == after) return;
    words_[word] ^= before ^ after;
    missing_ += static_cast<uint64_t>(__builtin_popcountll(before));
    missing_ -= static_cast<uint64_t>(__builtin_popcountll(after));
  }

  uint64_t missing_;
  std::unique_ptr<uint64_t[], Free> words_;  // of calloc: untouched pages of a large one cost nothing
};

}  // namespace soft

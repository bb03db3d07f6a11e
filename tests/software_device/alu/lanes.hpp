// Instructions that compute each lane from the same lane of their operands.
#pragma once

#include "fastest.hpp"

namespace soft {

template <class To, class From, class Operation>
inline void unary(Warp& warp, const Inst& instruction, Operation operation) {
  To* d = R<To>(warp, instruction.d);
  const From* a = R<From>(warp, instruction.a);
  each(warp, d, [=](int lane) { return operation(a[lane]); });
}

template <class T, class Operation>
inline void binary(Warp& warp, const Inst& instruction, Operation operation) {
  T* d = R<T>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b);
  each(warp, d, [=](int lane) { return operation(a[lane], b[lane]); });
}

template <class T, class Operation>
inline void ternary(Warp& warp, const Inst& instruction, Operation operation) {
  T* d = R<T>(warp, instruction.d);
  const T *a = R<T>(warp, instruction.a), *b = R<T>(warp, instruction.b), *c = R<T>(warp, instruction.c);
  each(warp, d, [=](int lane) { return operation(a[lane], b[lane], c[lane]); });
}

// Predicates are one bit a lane; only those of active lanes are written.
inline u32 predicate(Warp& warp, u32 offset) { return *R<u32>(warp, offset); }
inline void set_predicate(Warp& warp, u32 offset, u32 lanes_of_warp) {
  u32* d = R<u32>(warp, offset);
  *d = (*d & ~warp.mask) | (lanes_of_warp & warp.mask);
}

// A register of `size` bytes, whatever its type.
inline u64 read_bits(Warp& warp, u32 offset, int size, int lane) {
  switch (size) {
    case 2:
      return R<u16>(warp, offset)[lane];
    case 4:
      return R<u32>(warp, offset)[lane];
    default:
      return R<u64>(warp, offset)[lane];
  }
}
inline void write_bits(Warp& warp, u32 offset, int size, int lane, u64 value) {
  switch (size) {
    case 2:
      R<u16>(warp, offset)[lane] = static_cast<u16>(value);
      break;
    case 4:
      R<u32>(warp, offset)[lane] = static_cast<u32>(value);
      break;
    default:
      R<u64>(warp, offset)[lane] = value;
  }
}

// Handlers of an operation on one or two operands of its own type.
template <class T, class Operation>
void one(Warp& warp, const Inst& instruction) {
  unary<T, T>(warp, instruction, Operation());
}
template <class T, class Operation>
void two(Warp& warp, const Inst& instruction) {
  binary<T>(warp, instruction, Operation());
}

}  // namespace soft

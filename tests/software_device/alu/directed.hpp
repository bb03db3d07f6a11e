// Arithmetic in a rounding direction other than to nearest even: .rz, .rm and .rp (PTX ISA, "Rounding Modifiers").
#pragma once

#include <cfenv>

#include "numbers.hpp"

namespace soft {

// Rounds in this direction while it lives. What is computed meanwhile must go through volatile variables, so that the
// compiler moves nothing across the change.
class RoundingDirection {
 public:
  explicit RoundingDirection(Rounding rounding) : before_(std::fegetround()) { std::fesetround(mode(rounding)); }
  ~RoundingDirection() { std::fesetround(before_); }
  RoundingDirection(const RoundingDirection&) = delete;
  RoundingDirection& operator=(const RoundingDirection&) = delete;

 private:
  static int mode(Rounding rounding) {
    switch (rounding) {
      case Rounding::kZero:
        return FE_TOWARDZERO;
      case Rounding::kDown:
        return FE_DOWNWARD;
      case Rounding::kUp:
        return FE_UPWARD;
      default:
        return FE_TONEAREST;
    }
  }
  int before_;
};

// operation(operands...), rounded in this direction.
template <class Operation, class T, class... Ts>
inline T directed(Rounding rounding, Operation operation, T first, Ts... others) {
  const RoundingDirection direction(rounding);
  return [&](volatile T a, volatile Ts... b) {
    volatile T result = operation(T(a), Ts(b)...);
    return T(result);
  }(first, others...);
}

}  // namespace soft

// Functions that a GPU computes to a documented error only (PTX ISA: ex2.approx, lg2.approx, rcp.approx, rsqrt.approx,
// sqrt.approx, sin.approx, cos.approx, tanh.approx, div.approx, div.full). Here each is the exact result, rounded once:
// inside every bound, and never the bits of a GPU that a test may ask for.
//
//   ex2    2^-22.5 relative (2 ulp)     lg2    2^-22 absolute in (0.5, 2), else 2^-22 relative
//   rcp    2^-23 relative (1 ulp)       rsqrt  2^-22.9 relative              sqrt   2^-23 relative
//   sin, cos  2^-20.5 absolute in [-pi, pi]                                  tanh   2^-11 relative
//   div.approx, div.full  2 ulp         rcp.approx.ftz.f64, rsqrt.approx.f64  2^-20 relative
#include <cmath>

#include "../ptx/rule.hpp"
#include "lanes.hpp"

namespace soft {
namespace {

struct ExponentialOfTwo {
  double operator()(double x) const { return std::exp2(x); }
};
struct LogarithmOfTwo {
  double operator()(double x) const { return std::log2(x); }
};
struct Reciprocal {
  double operator()(double x) const { return 1 / x; }
};
struct ReciprocalSquareRoot {
  double operator()(double x) const { return 1 / std::sqrt(x); }
};
struct SquareRoot {
  double operator()(double x) const { return std::sqrt(x); }
};
struct Sine {
  double operator()(double x) const { return std::sin(x); }
};
struct Cosine {
  double operator()(double x) const { return std::cos(x); }
};
struct HyperbolicTangent {
  double operator()(double x) const { return std::tanh(x); }
};

template <class Function, bool flush>
void approximate(Warp& warp, const Inst& instruction) {
  float* d = R<float>(warp, instruction.d);
  const float* a = R<float>(warp, instruction.a);
  lanes(warp, [&](int lane) {
    const float result = static_cast<float>(Function()(flush ? ftz(a[lane]) : a[lane]));
    d[lane] = canon(flush ? ftz(result) : result);
  });
}
template <class Function>
Handler pick(const Variant& variant) {
  return variant.has("ftz") ? approximate<Function, true> : approximate<Function, false>;
}

// The .f64 forms read and write the upper 32 bits only, and .ftz flushes: the lower word of the result is 0.
double upper_word(double value) { return reinterpret<double>(reinterpret<u64>(value) & ~u64(0xffffffff)); }
double flush_subnormal(double value) {
  const u64 all = reinterpret<u64>(value);
  return (all & 0x7ff0000000000000) == 0 ? reinterpret<double>(all & u64(1) << 63) : value;
}
template <class Function, bool flush>
void approximate_double(Warp& warp, const Inst& instruction) {
  unary<double, double>(warp, instruction, [](double a) {
    a = upper_word(a);
    double result = upper_word(Function()(flush ? flush_subnormal(a) : a));
    if (flush) result = flush_subnormal(result);
    return result != result ? reinterpret<double>(u64(0x7fffffff) << 32) : result;
  });
}
template <class Function>
Handler pick_double(const Variant& variant) {
  return variant.has("ftz") ? approximate_double<Function, true> : approximate_double<Function, false>;
}

// div.approx multiplies by the reciprocal, which is 0 for a divisor of 2^126 and more; div.full scales it first.
template <bool full, bool flush>
void divide(Warp& warp, const Inst& instruction) {
  binary<float>(warp, instruction, [](float a, float b) {
    if (flush) {
      a = ftz(a);
      b = ftz(b);
    }
    float result = static_cast<float>(double(a) / double(b));
    if (!full && std::fabs(b) > 0x1p126f && !std::isinf(b)) {
      result = std::isinf(a) ? f32(Format<float>::kNaN) : std::copysign(0.f, std::copysign(1.f, a) * b);
      if (a != a) result = a;
    }
    return canon(flush ? ftz(result) : result);
  });
}
Handler pick_divide(const Variant& variant) {
  if (variant.has("full")) return variant.has("ftz") ? divide<true, true> : divide<true, false>;
  return variant.has("ftz") ? divide<false, true> : divide<false, false>;
}

}  // namespace

const Rules& approximate_rules() {
  static const Rules rules = {
      {"ex2.approx[.ftz].f32", "d, a", pick<ExponentialOfTwo>},
      {"lg2.approx[.ftz].f32", "d, a", pick<LogarithmOfTwo>},
      {"rcp.approx[.ftz].f32", "d, a", pick<Reciprocal>},
      {"rcp.approx.ftz.f64", "d, a", pick_double<Reciprocal>},
      {"rsqrt.approx[.ftz].f32", "d, a", pick<ReciprocalSquareRoot>},
      {"rsqrt.approx[.ftz].f64", "d, a", pick_double<ReciprocalSquareRoot>},
      {"sqrt.approx[.ftz].f32", "d, a", pick<SquareRoot>},
      {"sin.approx[.ftz].f32", "d, a", pick<Sine>},
      {"cos.approx[.ftz].f32", "d, a", pick<Cosine>},
      {"tanh.approx.f32", "d, a", pick<HyperbolicTangent>},
      {"div{.approx.full}[.ftz].f32", "d, a, b", pick_divide},
  };
  return rules;
}

}  // namespace soft

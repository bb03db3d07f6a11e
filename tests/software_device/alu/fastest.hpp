// A choice between two compilations of one function.
#pragma once

#include "../instruction.hpp"

namespace soft {

// The same function, compiled a second time for the vector instructions that most x86-64 processors have and no
// compiler takes for granted; fastest<function>() is the one for this processor. Both give the same bits.
#if defined(__x86_64__)
template <auto function>
struct WithVectors;
template <class... Arguments, void (*function)(Arguments...)>
struct WithVectors<function> {
  __attribute__((target("avx2,fma"), flatten)) static void run(Arguments... arguments) { function(arguments...); }
};
inline bool has_vectors() {
  static const bool answer = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return answer;
}
template <auto function>
auto fastest() {
  return has_vectors() ? &WithVectors<function>::run : function;
}
#else
template <auto function>
auto fastest() {
  return function;
}
#endif

}  // namespace soft

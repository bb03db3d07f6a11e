// atom and red. PTX ISA, "Parallel Synchronization and Communication Instructions: atom, red".
#include <algorithm>
#include <type_traits>

#include "execution/counters.hpp"
#include "execution/grid_order.hpp"
#include "execution/handlers.hpp"

namespace soft {

namespace {

enum class Operation { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompareAndSwap, kIncrement, kDecrement };

template <Operation kOperation, class T>
T updated(T old, T value, T swap) {
  (void)value, (void)swap;
  if constexpr (kOperation == Operation::kAdd) return static_cast<T>(old + value);
  if constexpr (kOperation == Operation::kMin) return std::min(old, value);
  if constexpr (kOperation == Operation::kMax) return std::max(old, value);
  if constexpr (kOperation == Operation::kExchange) return value;
  if constexpr (kOperation == Operation::kCompareAndSwap) return old == value ? swap : old;
  if constexpr (!std::is_floating_point<T>::value) {
    if constexpr (kOperation == Operation::kAnd) return old & value;
    if constexpr (kOperation == Operation::kOr) return old | value;
    if constexpr (kOperation == Operation::kXor) return old ^ value;
    if constexpr (kOperation == Operation::kIncrement) return old >= value ? 0 : static_cast<T>(old + 1);
    if constexpr (kOperation == Operation::kDecrement) {
      return old == 0 || old > value ? value : static_cast<T>(old - 1);
    }
  }
  return old;
}

// The lanes one after another, as good an order as any.
template <Operation kOperation, class T>
void atomic(Warp& warp, const Inst& inst) {
  const T *value = R<T>(warp, inst.b), *swap = R<T>(warp, inst.c);
  T* const result = inst.ds ? R<T>(warp, inst.d) : nullptr;
  lanes(warp, [&](int lane) {
    const u64 address = address_of(warp, inst, lane);
    char* const at = locate(warp, inst, lane, address, sizeof(T), Use::kAtomic);
    if (grid_order(warp) && (inst.space == Global || (inst.space == Generic && address < kShared)))
      order_atomic(warp, inst, address);
    T old;
    memcpy(&old, at, sizeof old);
    const T now = updated<kOperation, T>(old, value[lane], swap[lane]);
    memcpy(at, &now, sizeof now);
    if (result) result[lane] = old;
  });
}

template <Operation kOperation>
Handler of_type(const std::string& type) {
  if (type == "u32" || type == "b32") return atomic<kOperation, u32>;
  if (type == "s32") return atomic<kOperation, s32>;
  if (type == "u64" || type == "b64") return atomic<kOperation, u64>;
  if (type == "s64") return atomic<kOperation, s64>;
  if (type == "f32" && kOperation == Operation::kAdd) return atomic<kOperation, float>;
  if (type == "f64" && kOperation == Operation::kAdd) return atomic<kOperation, double>;
  if (type == "b16" && kOperation == Operation::kCompareAndSwap) return atomic<kOperation, u16>;
  return nullptr;
}

}  // namespace

Handler atomic_handler(const std::string& operation, const std::string& type) {
  if (operation == "add") return of_type<Operation::kAdd>(type);
  if (operation == "min") return of_type<Operation::kMin>(type);
  if (operation == "max") return of_type<Operation::kMax>(type);
  if (operation == "and") return of_type<Operation::kAnd>(type);
  if (operation == "or") return of_type<Operation::kOr>(type);
  if (operation == "xor") return of_type<Operation::kXor>(type);
  if (operation == "exch") return of_type<Operation::kExchange>(type);
  if (operation == "cas") return of_type<Operation::kCompareAndSwap>(type);
  if (operation == "inc") return of_type<Operation::kIncrement>(type);
  if (operation == "dec") return of_type<Operation::kDecrement>(type);
  return nullptr;
}

}  // namespace soft

// s_k = keep_k * s_k + take_k * x in place, with x = g_k or g_k^2, and out = sum_k of_state_k * s_k + of_grads_k * g_k,
// over a range of columns: one read of K rows of gradients, one read and one write of K rows of state, one write.
//
// A block of columns goes through the tasks one after another, and its sums stay in the first-level cache meanwhile. An
// element of the output is written after all tasks have read the block, so that the output may be one of the gradients.
//
// Work: four multiply-adds for each column and task. Products and sums are double for every dtype. The sums take the
// new state before it is rounded. They run over the tasks in ascending order and are rounded once to the output. So
// they are deterministic and do not depend on an element's address.
#include "in_order.h"
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int64_t kColumns = 1024;  // of a block: its sums take 8 KiB
static_assert(kColumns % kLanes == 0);

struct Coefficients {
  double keep, take, of_state, of_grads;
};

// Moves one task's state over n columns, and adds to their sums. S or T is Absent where the task has no such row.
template <bool Square, class T, class S>
void add_task(const T* g, S* s, int64_t n, const Coefficients& c, double* sums) {
  const auto step = [&c](const T* g, S* s, double* sums, int64_t i) __attribute__((always_inline)) {
    F64 x[2], state[2], sum[2];
    load_in_order(g, i, x);
    load_in_order(s, i, state);
    load_in_order(sums, i, sum);
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      if (kPresent<S>) {
        state[part] = c.keep * state[part] + c.take * (Square ? x[part] * x[part] : x[part]);
        sum[part] += c.of_state * state[part];
      }
      if (kPresent<T>) sum[part] += c.of_grads * x[part];
    }
    store_in_order(s, i, state);
    store_in_order(sums, i, sum);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(g, s, sums, i);
  if (i == n) return;
  const Tail<T> last(g, i, n - i);
  Tail<S> last_state(s, i, n - i);
  step(last.elements, last_state.elements, sums + i, 0);
  last_state.store(s, i, n - i);
}

template <class Out>
void write(const double* sums, int64_t n, Out* out) {
  F64 v[2];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    load_in_order(sums, i, v);
    store_in_order(out, i, v);
  }
  if (i == n) return;
  Tail<Out> last(out, i, n - i);
  load_in_order(sums, i, v);
  store_in_order(last.elements, 0, v);
  last.store(out, i, n - i);
}

template <bool Square, class T, class S>
void advance_range(const TaskView& grads, const TaskView& state, int64_t begin, int64_t end, const double* coefficients,
                   DType out_dtype, void* const* out) {
  const int64_t K = grads.num_tasks;
  alignas(64) double sums[kColumns];
  for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t length) {
    for (int64_t at = first; at < first + length; at += kColumns) {
      const int64_t n = first + length - at < kColumns ? first + length - at : kColumns;
      __builtin_memset(sums, 0, sizeof sums);
      for (int64_t k = 0; k < K; ++k) {
        const T* g = static_cast<const T*>(grads.tensor(t)[k]);
        S* s = static_cast<S*>(const_cast<void*>(state.tensor(t)[k]));
        const Coefficients c{coefficients[k], coefficients[K + k], coefficients[2 * K + k], coefficients[3 * K + k]};
        if (g && s)
          add_task<Square>(g + at, s + at, n, c, sums);
        else if (g)
          add_task<Square>(g + at, static_cast<Absent*>(nullptr), n, c, sums);
        else if (s)
          add_task<Square>(static_cast<const Absent*>(nullptr), s + at, n, c, sums);
      }
      visit(out_dtype, [&]<class Out>(Out) { write(sums, n, static_cast<Out*>(out[t]) + at); });
    }
  });
}

}  // namespace

void advance(const TaskView& grads, const TaskView& state, int64_t begin, int64_t end, const double* coefficients,
             bool square, DType out_dtype, void* const* out) {
  visit(grads.dtype, [&]<class T>(T) {
    visit(state.dtype, [&]<class S>(S) {
      if (square)
        advance_range<true, T, S>(grads, state, begin, end, coefficients, out_dtype, out);
      else
        advance_range<false, T, S>(grads, state, begin, end, coefficients, out_dtype, out);
    });
  });
}

}  // namespace mtlfast::MTLFAST_ISA

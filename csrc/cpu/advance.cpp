// s_k = keep_k * s_k + take_k * x in place, with x = g_k or g_k^2, and out = sum_k of_state_k * s_k + of_grads_k * g_k,
// over a range of columns: one read of K rows of gradients, one read and one write of K rows of state, one write.
//
// A block of columns goes through the tasks one after another, and its sums stay in the first-level cache meanwhile. An
// element of the output is written after all tasks have read the block, so that the output may be one of the gradients.
// Each row's next block is prefetched into the second-level cache: the processor's own prefetching stops at the end of
// a block, and without it K = 8 took twice as long.
//
// Work: four multiply-adds for each column and task. Products and sums are double for every dtype. The sums take the
// new state before it is rounded. They run over the tasks in ascending order and are rounded once to the output. So
// they are deterministic and do not depend on an element's address.
#include "in_order.h"
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int64_t kColumns = 1024;             // of a block: its sums take 8 KiB
constexpr int64_t kFewest = 128;               // and of one with many tasks
constexpr int64_t kPrefetchedBytes = 1 << 18;  // of all rows: what the second-level cache has room for
static_assert(kColumns % kLanes == 0 && kFewest % kLanes == 0);

// Prefetches what follows the elements i .. i + kLanes at a distance of `ahead` elements; Write: to be written too.
template <bool Write, class T>
MTLFAST_INLINE void prefetch(const T* row, int64_t i, int64_t ahead) {
  if (!kPresent<T> || i * sizeof(T) % 64 != 0) return;  // once a cache line
  for (int64_t byte = 0; byte < static_cast<int64_t>(kLanes * sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(row + i + ahead) + byte, Write, 2);
}

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
  for (; i + kLanes <= n; i += kLanes) {
    prefetch<false>(g, i, n);
    prefetch<true>(s, i, n);
    step(g, s, sums, i);
  }
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
  const int64_t fitting = kPrefetchedBytes / (K * static_cast<int64_t>(sizeof(T) + sizeof(S))) / kFewest * kFewest;
  const int64_t columns = fitting > kColumns ? kColumns : fitting < kFewest ? kFewest : fitting;
  alignas(64) double sums[kColumns];
  for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t length) {
    for (int64_t at = first; at < first + length; at += columns) {
      const int64_t n = first + length - at < columns ? first + length - at : columns;
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

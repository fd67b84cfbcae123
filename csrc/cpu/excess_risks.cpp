// risks[k] = sum of x / sqrt(H_k + x + eps) over a range of columns, with x = (factors[k] * g_k)^2: one read of 2 K
// rows.
//
// Work: a square root and a division for each column and task, which take about as long as the reads. Elements and sums
// are double for every dtype. Runs of kRun columns are summed in lanes, and the runs one after another. Deterministic:
// a column's lane depends on its place in the tensor and on sizes alone.
#include "in_order.h"
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int64_t kRun = 4096;  // columns

// x / sqrt(v) for v > 0.
MTLFAST_INLINE F64 over_root(F64 x, F64 v) {
#if MTLFAST_VECTOR_BYTES == 64
  // An estimate of 14 bits and two of Newton's steps take half the time of a square root and a division.
  F64 root = (F64)_mm512_maskz_rsqrt14_pd(0xff, (__m512d)v);
  for (int step = 0; step < 2; ++step) root *= 1.5 - 0.5 * v * root * root;
  return x * (v > __DBL_MAX__ ? F64{} : root);  // the steps make NaN of an infinite v
#elif defined(__F16C__)
  return x / (F64)_mm256_sqrt_pd((__m256d)v);
#else
  double roots[kLanes / 2];
  for (int lane = 0; lane < kLanes / 2; ++lane) roots[lane] = __builtin_sqrt(v[lane]);
  return x / load_unaligned<F64>(roots);
#endif
}

// The sum over n columns. H is Absent where the task has no such row.
template <class T, class H>
double sum_run(const T* g, const H* h, int64_t n, double factor, double eps) {
  F64 sums[2] = {};
  const auto step = [&sums, factor, eps](const T* g, const H* h, int64_t i) __attribute__((always_inline)) {
    F64 x[2], before[2];
    load_in_order(g, i, x);
    load_in_order(h, i, before);
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      x[part] *= factor;
      x[part] *= x[part];
      sums[part] += over_root(x[part], before[part] + x[part] + eps);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) step(g, h, i);
  if (i < n) {
    const Tail<T> last(g, i, n - i);
    const Tail<H> last_before(h, i, n - i);
    step(last.elements, last_before.elements, 0);
  }
  double total = 0;
  for (int lane = 0; lane < kLanes / 2; ++lane) total += sums[0][lane] + sums[1][lane];
  return total;
}

}  // namespace

void excess_risks(const TaskView& grads, const TaskView& sums, int64_t begin, int64_t end, double eps,
                  const double* factors, double* risks) {
  const int64_t K = grads.num_tasks;
  __builtin_memset(risks, 0, K * 8);
  visit(grads.dtype, [&]<class T>(T) {
    visit(sums.dtype, [&]<class H>(H) {
      for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t length) {
        for (int64_t k = 0; k < K; ++k) {
          const T* g = static_cast<const T*>(grads.tensor(t)[k]);
          const H* h = static_cast<const H*>(sums.tensor(t)[k]);
          if (!g) continue;
          for (int64_t at = first; at < first + length; at += kRun) {
            const int64_t n = first + length - at < kRun ? first + length - at : kRun;
            risks[k] += h ? sum_run(g + at, h + at, n, factors[k], eps)
                          : sum_run(g + at, static_cast<const Absent*>(nullptr), n, factors[k], eps);
          }
        }
      });
    });
  });
}

}  // namespace mtlfast::MTLFAST_ISA

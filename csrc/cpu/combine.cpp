// out[r] (+)= sum_k coefficients[r, k] * g_k over a range of columns: one read of the K rows, one write of R.
//
// Rows are taken four at a time; between groups the sums of a block wait in the first-level cache, so at most four
// streams are open at once (one pass over all rows loses half its speed at K = 32). A block is read whole by every
// group before its last group writes, element after element: out may be one of the rows. With R > 1 the block is
// short enough for its K rows to stay in the cache while all R outputs are made.
//
// Work: R*K multiply-adds a column. Sums run in float (double for fp64), tasks in ascending order, and round once to
// the output: deterministic, and the same for an element wherever it lies.
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int64_t kGroup = 4;
constexpr int64_t kSingleBlock = 4096;  // columns of a block when R = 1: its sums fill half the first-level cache
constexpr int64_t kManyBlock = 512;     // and when R > 1
constexpr int64_t kMostStep = 64;       // no Simd<T>::kStep is larger

// One group of rows over n columns, a multiple of the step. First: sums start here. Last: they go to out.
template <class T, int Rows, bool First, bool Last>
void pass(const T* const* rows, const typename Simd<T>::Scalar* weights, int64_t n, bool accumulate,
          typename Simd<T>::Vec* sums, T* out) {
  using S = Simd<T>;
  for (int64_t c = 0; c < n; c += S::kStep, sums += S::kParts) {
    typename S::Vec v[S::kParts];
#pragma GCC unroll 2
    for (int part = 0; part < S::kParts; ++part) {
      v[part] = First ? weights[0] * S::load(rows[0] + c, part) : sums[part] + weights[0] * S::load(rows[0] + c, part);
#pragma GCC unroll 4
      for (int i = 1; i < Rows; ++i) v[part] += weights[i] * S::load(rows[i] + c, part);
      if (Last && accumulate) v[part] += S::load(out + c, part);
      if (!Last) sums[part] = v[part];
    }
    if (Last) S::store(out + c, v);
  }
}

template <class T, bool First, bool Last>
void group(const T* const* rows, int64_t count, const typename Simd<T>::Scalar* weights, int64_t n, bool accumulate,
           typename Simd<T>::Vec* sums, T* out) {
  switch (count) {
    case 1:
      return pass<T, 1, First, Last>(rows, weights, n, accumulate, sums, out);
    case 2:
      return pass<T, 2, First, Last>(rows, weights, n, accumulate, sums, out);
    case 3:
      return pass<T, 3, First, Last>(rows, weights, n, accumulate, sums, out);
    default:
      return pass<T, 4, First, Last>(rows, weights, n, accumulate, sums, out);
  }
}

// All `count` rows over n columns, a multiple of the step and at most a block.
template <class T>
void weighted_sum(const T* const* rows, int64_t count, const typename Simd<T>::Scalar* weights, int64_t n,
                  bool accumulate, typename Simd<T>::Vec* sums, T* out) {
  if (count <= kGroup) return group<T, true, true>(rows, count, weights, n, accumulate, sums, out);
  group<T, true, false>(rows, kGroup, weights, n, accumulate, sums, out);
  int64_t k = kGroup;
  for (; count - k > kGroup; k += kGroup)
    group<T, false, false>(rows + k, kGroup, weights + k, n, accumulate, sums, out);
  group<T, false, true>(rows + k, count - k, weights + k, n, accumulate, sums, out);
}

// The memory that one range needs beside its operands.
template <class T>
struct Scratch {
  using S = Simd<T>;
  typename S::Vec* sums;        // [kSingleBlock]
  const T** rows;               // [K] where the present tasks' rows of this block begin
  T* tail;                      // [K + 1, step] what is left of each row and of out, padded with zeros
  typename S::Scalar* weights;  // [R, K] of the present tasks

  static int64_t bytes(int64_t K, int64_t R) {
    return kSingleBlock * 8 + round_up(K * 8, 64) + (K + 1) * kMostStep * 8 + R * K * 8;
  }
  Scratch(void* memory, int64_t K) {
    char* p = static_cast<char*>(memory);
    sums = reinterpret_cast<typename S::Vec*>(p);
    rows = reinterpret_cast<const T**>(p += kSingleBlock * 8);
    tail = reinterpret_cast<T*>(p += round_up(K * 8, 64));
    weights = reinterpret_cast<typename S::Scalar*>(p + (K + 1) * kMostStep * 8);
  }
};

// The last n < step columns of a piece: s.rows are padded copies, so that every element meets the same arithmetic.
template <class T>
void tail_sum(const Scratch<T>& s, int64_t count, const typename Simd<T>::Scalar* weights, int64_t n, bool accumulate,
              T* out) {
  constexpr int step = Simd<T>::kStep;
  T* sum = s.tail + count * step;
  if (accumulate) __builtin_memcpy(sum, out, n * sizeof(T));
  weighted_sum(s.rows, count, weights, step, accumulate, s.sums, sum);
  __builtin_memcpy(out, sum, n * sizeof(T));
}

template <class T>
void combine_range(const TaskView& grads, int64_t begin, int64_t end, const double* coefficients, int64_t R,
                   bool accumulate, void* scratch, void* const* out) {
  const int64_t K = grads.num_tasks, block = R == 1 ? kSingleBlock : kManyBlock, step = Simd<T>::kStep;
  const Scratch<T> s(scratch, K);
  for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t length) {
    const void* const* data = grads.tensor(t);
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    int64_t count = 0;
    for (int64_t k = 0; k < K; ++k)
      if (data[k]) {
        for (int64_t r = 0; r < R; ++r)
          s.weights[r * K + count] = static_cast<typename Simd<T>::Scalar>(coefficients[r * K + k]);
        ++count;
      }
    for (int64_t at = first; at < first + length; at += block) {
      const int64_t n = first + length - at < block ? first + length - at : block, whole = n / step * step;
      int64_t present = 0;
      for (int64_t k = 0; k < K; ++k)
        if (data[k]) s.rows[present++] = static_cast<const T*>(data[k]) + at;
      if (whole > 0)
        for (int64_t r = 0; r < R; ++r)
          weighted_sum(s.rows, count, s.weights + r * K, whole, accumulate, s.sums,
                       static_cast<T*>(out[t]) + r * numel + at);
      if (n == whole) continue;
      __builtin_memset(s.tail, 0, (count + 1) * step * sizeof(T));
      for (int64_t k = 0; k < count; ++k) {
        __builtin_memcpy(s.tail + k * step, s.rows[k] + whole, (n - whole) * sizeof(T));
        s.rows[k] = s.tail + k * step;
      }
      for (int64_t r = 0; r < R; ++r)
        tail_sum(s, count, s.weights + r * K, n - whole, accumulate, static_cast<T*>(out[t]) + r * numel + at + whole);
    }
  });
}

}  // namespace

int64_t combine_scratch(int64_t num_tasks, int64_t num_out) { return Scratch<double>::bytes(num_tasks, num_out); }

void combine(const TaskView& grads, int64_t begin, int64_t end, const double* coefficients, int64_t num_out,
             bool accumulate, void* scratch, void* const* out) {
  visit(grads.dtype,
        [&]<class T>(T) { combine_range<T>(grads, begin, end, coefficients, num_out, accumulate, scratch, out); });
}

}  // namespace mtlfast::MTLFAST_ISA

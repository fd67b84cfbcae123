// s_k = keep_k * s_k + take_k * x in place, with x = g_k or g_k^2, and out = sum_k of_state_k * s_k + of_grads_k * g_k:
// one read of K rows of gradients, one read and one write of K rows of state, one write.
//
// Thread to work: blocks take chunks in turn. Inside a chunk thread i takes groups i, i + 256, ..., where a group is
// the elements that 16 bytes of the wider dtype hold. It loads the rows of two tasks at a time, so that they are in
// flight together, stores their state, and adds to the sums. A thread reads all rows of an element before it writes its
// sum, so that out may be one of the gradients.
//
// Whether all coefficients are finite every block finds out by itself. If one is not, no state is stored and out is
// NaN.
//
// Bytes moved: (K * itemsize + 2 * K * itemsize of state + itemsize of out) * P. Products and sums are double for every
// dtype; the sums take the new state before it is rounded. Deterministic: an element's sum runs over the tasks in
// ascending order and rounds once.
#pragma once
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

constexpr int kTasksAtOnce = 2;

// The dtype of out is an argument, since it only says how a sum is stored, once for all tasks.
struct Advance {
  const double* coefficients;  // [4, K]: keep, take, of_state, of_grads
  int num_tasks, square;
  int out_dtype;  // a DType
};
enum OutDType { kOutFloat32, kOutFloat64, kOutBFloat16, kOutFloat16 };  // as DType

template <class T, class S>
constexpr int kSmaller = kGroup<T> < kGroup<S> ? kGroup<T> : kGroup<S>;  // elements of a group
// The least number of blocks that share a processor, for the compiler, which would otherwise spill to have more.
template <class T, class S>
constexpr int kAdvancing = kSmaller<T, S> > 4 ? 2 : 3;

template <class Out, int N>
__device__ inline void store_sums(const double (&sums)[N], Out* row, long long at, int left, int bytes) {
  Group<Out, N> result;
#pragma unroll
  for (int e = 0; e < N; ++e) narrow(sums[e], result.element[e]);
  store_group(result, row + at, left, bytes);
}

// An entry's rows are K gradients, K rows of state and the output, and its tag is the widest access to the gradients,
// plus 256 times that to the state, plus 65536 times that to the output. Grid: any; block: kThreads; dynamic shared
// memory: 4 K doubles.
template <class T, class S>
__global__ void __launch_bounds__(kThreads, kAdvancing<T, S>)
    advance_kernel(const Table __grid_constant__ table, const Advance advance) {
  constexpr int width = kSmaller<T, S>;
  const int K = advance.num_tasks;
  double* keep = static_cast<double*>(dynamic_shared());  // [4, K]
  const double *take = keep + K, *of_state = take + K, *of_grads = of_state + K;
  bool finite = true;
  for (int i = thread(); i < 4 * K; i += kThreads) {
    keep[i] = advance.coefficients[i];
    finite = finite && isfinite(keep[i]);
  }
  finite = !__syncthreads_or(!finite);

  for (long long chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    const int tag = table.tag(piece.entry), g_bytes = tag & 255, s_bytes = tag >> 8 & 255, out_bytes = tag >> 16;
    for (int column = thread() * width; column < piece.n; column += kThreads * width) {
      const long long at = piece.begin + column;
      const int left = piece.n - column;
      double sums[width];
#pragma unroll
      for (int e = 0; e < width; ++e) sums[e] = finite ? 0.0 : __builtin_nan("");
      for (int first = 0; finite && first < K; first += kTasksAtOnce) {
        const T* gradients[kTasksAtOnce];
        const S* states[kTasksAtOnce];
        Group<T, width> g[kTasksAtOnce];
        Group<S, width> s[kTasksAtOnce];
#pragma unroll
        for (int i = 0; i < kTasksAtOnce; ++i) {
          const T* gradient = first + i < K ? table.row<const T>(piece.entry, first + i) : nullptr;
          const S* state = first + i < K ? table.row<const S>(piece.entry, K + first + i) : nullptr;
          gradients[i] = gradient ? gradient + at : nullptr;
          states[i] = state ? state + at : nullptr;
        }
        load_groups(gradients, left, g_bytes, g);
        load_groups(states, left, s_bytes, s);
#pragma unroll
        for (int i = 0; i < kTasksAtOnce; ++i) {
          const int k = first + i;
          if (states[i]) {
#pragma unroll
            for (int e = 0; e < width; ++e) {
              const double x = widen_to<double>(g[i].element[e]);
              const double state = keep[k] * widen_to<double>(s[i].element[e]) + take[k] * (advance.square ? x * x : x);
              sums[e] += of_state[k] * state;
              narrow(state, s[i].element[e]);
            }
            store_group(s[i], table.row<S>(piece.entry, K + k) + at, left, s_bytes);
          }
          if (gradients[i]) {
#pragma unroll
            for (int e = 0; e < width; ++e) sums[e] += of_grads[k] * widen_to<double>(g[i].element[e]);
          }
        }
      }
      const int out_row = 2 * K;
      switch (advance.out_dtype) {
        case kOutFloat32:
          store_sums(sums, table.row<float>(piece.entry, out_row), at, left, out_bytes);
          break;
        case kOutFloat64:
          store_sums(sums, table.row<double>(piece.entry, out_row), at, left, out_bytes);
          break;
        case kOutBFloat16:
          store_sums(sums, table.row<__nv_bfloat16>(piece.entry, out_row), at, left, out_bytes);
          break;
        case kOutFloat16:
          store_sums(sums, table.row<__half>(piece.entry, out_row), at, left, out_bytes);
          break;
      }
    }
  }
}

}  // namespace mtlfast::cuda

// out[r] (+)= sum_k scale * coefficients[r, k] * g_k: one read of the K rows, one write of R.
//
// Thread to work: blocks take chunks in turn. Inside a chunk thread i takes groups i, i + 256, ..., where a group is 16
// bytes of each row. It loads four rows at a time, so that their loads are in flight together, and adds them to Outs
// outputs at once. For more outputs it reads the group's rows again, from the first-level cache. A thread reads all
// rows of an element before it writes the element, so that with R = 1 out may be one of the rows.
//
// Bytes moved: (K * itemsize + R * itemsize of out) * P; with accumulate R reads more. Weights, products and sums are
// double for every dtype, because the update can be far shorter than the gradients that cancel in it. Deterministic: an
// element's sum runs over the tasks in ascending order and rounds once.
#pragma once
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

constexpr int kRowsAtOnce = 4;
constexpr int kMostWeights = 4096;  // R * K of one launch: 32 KiB of shared memory

// The outputs of one launch: num_out of the op's, from first_out on. With groups of tensors it is one output, by the
// weights of each entry's group.
struct Outputs {
  const double* coefficients;  // [R, K], with groups [G, K]
  double scale;
  int num_tasks, out_row;  // K, and which of an entry's rows is written
  int first_out, num_out;
  int accumulate;
};

// The least number of blocks that share a processor, for the compiler, which would otherwise spill to have more.
template <class T, int Outs>
constexpr int kSumBytes = Outs * kGroup<T> * sizeof(double);  // of one thread
template <class T, int Outs>
constexpr int kResident = kSumBytes<T, Outs> <= 64    ? 4
                          : kSumBytes<T, Outs> <= 128 ? 2
                                                      : 1;

// With accumulate an output is read before the rows, to be in flight with them, where that takes four registers or
// fewer. Elsewhere it is read after them, into their registers, one output after the other.
template <class T, class Out, int Outs>
constexpr bool kReadFirst = Outs == 1 && sizeof(Group<Out, kGroup<T>>) <= 16;

// An entry's rows are the K gradients and then the tensor [R, numel] that is written, unless that is one of them. Its
// tag is the widest access to the gradients plus 32 times the widest to the output, and its group (table.h). Grid: any;
// block: kThreads; dynamic shared memory: num_out * K doubles.
template <class T, class Out, int Outs>
__global__ void __launch_bounds__(kThreads, kResident<T, Outs>)
    combine_kernel(const Table __grid_constant__ table, const Outputs outputs) {
  constexpr int width = kGroup<T>;
  double* weights = static_cast<double*>(dynamic_shared());  // [num_out, K]
  const int K = outputs.num_tasks;
  int staged = -1;  // the group whose weights these are
  for (long long chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    const int tag = table.tag(piece.entry), load_bytes = tag & 31, store_bytes = tag >> 5 & 31;
    if (const int group = tag >> kGroupBit; group != staged) {
      __syncthreads();  // all have read those of the group before
      const double* from = outputs.coefficients + static_cast<long long>(outputs.first_out + group) * K;
      for (int i = thread(); i < outputs.num_out * K; i += kThreads) weights[i] = from[i] * outputs.scale;
      __syncthreads();
      staged = group;
    }
    const long long numel = table.numel(piece.entry);
    for (int column = thread() * width; column < piece.n; column += kThreads * width) {
      const long long at = piece.begin + column;
      const int left = piece.n - column;
      for (int r = 0; r < outputs.num_out; r += Outs) {
        double sums[Outs][width] = {};
        const auto place = [&](int o) {
          return table.row<Out>(piece.entry, outputs.out_row) + (outputs.first_out + r + o) * numel + at;
        };
        Group<Out, width> before[1];
        const auto read_before = [&](int o) {
          const Out* const from[1] = {place(o)};
          load_groups(from, left, store_bytes, before);
        };
        if (kReadFirst<T, Out, Outs> && outputs.accumulate) read_before(0);
        for (int k = 0; k < K; k += kRowsAtOnce) {
          const T* from[kRowsAtOnce];
          Group<T> rows[kRowsAtOnce];
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) {
            const T* row = k + i < K ? table.row<const T>(piece.entry, k + i) : nullptr;
            from[i] = row ? row + at : nullptr;
          }
          load_groups(from, left, load_bytes, rows);
#pragma unroll
          for (int i = 0; i < kRowsAtOnce; ++i) {
            if (!from[i]) continue;
#pragma unroll
            for (int o = 0; o < Outs; ++o) {
              const double weight = weights[(r + o) * K + k + i];
#pragma unroll
              for (int e = 0; e < width; ++e) sums[o][e] += weight * widen_to<double>(rows[i].element[e]);
            }
          }
        }
#pragma unroll
        for (int o = 0; o < Outs; ++o) {
          if (!kReadFirst<T, Out, Outs> && outputs.accumulate) read_before(o);
          Group<Out, width> result;
#pragma unroll
          for (int e = 0; e < width; ++e) {
            if (outputs.accumulate) sums[o][e] += widen_to<double>(before[0].element[e]);
            narrow(sums[o][e], result.element[e]);
          }
          store_group(result, place(o), left, store_bytes);
        }
      }
    }
  }
}

}  // namespace mtlfast::cuda

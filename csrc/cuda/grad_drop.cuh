// GradDrop: keeps the gradients of one sign, chosen at random by the sign purity (csrc/dropping.h says what is
// computed).
//
// Thread to work: blocks take chunks in turn. Inside a chunk thread i takes groups i, i + 256, ... of 16 bytes of each
// row, four rows at a time, and adds them to the sums of positive and of negative gradients. Then it draws the group's
// random numbers, one call of Philox for each four columns, and writes the group. It reads all rows of an element
// before it writes the element, so that the output may be one of the rows.
//
// Bytes moved: (K + 1) * itemsize * P, and as much as they hold for given random numbers and thresholds. Sums are
// double for every dtype, because what is left of gradients that cancel is small. Deterministic: the sums run over the
// tasks in ascending order, and a random number depends on the seed and the column alone. Random numbers and decisions
// are those of the CPU kernel: a comparison of sums has no product that could be fused with an addition.
#pragma once
#include "../dropping.h"
#include "elements.cuh"
#include "table.h"

namespace mtlfast::cuda {

constexpr int kRowsOfDrop = 4;  // loaded at once

// What a launch takes besides the table. An entry's rows are the K gradients; the output; its first column, a number;
// the given random numbers and thresholds, or 0. Its tag is the widest access to the gradients, plus 256 times that to
// the output, plus 65536 times that to the other two.
struct Drop {
  const double* leak;              // [K]; nullptr: zeros
  const unsigned long long* seed;  // one number, for Drawn
  int form, num_tasks;
  static constexpr int kRows = 4;  // of an entry, after the gradients
};

struct RandomWords {
  unsigned word[4];
  __device__ unsigned at(int i) const { return i < 2 ? (i == 0 ? word[0] : word[1]) : (i == 2 ? word[2] : word[3]); }
};

__device__ inline RandomWords random_words(unsigned long long seed, unsigned long long counter) {
  unsigned c0 = static_cast<unsigned>(counter), c1 = static_cast<unsigned>(counter >> 32), c2 = 0, c3 = 0;
  unsigned key0 = static_cast<unsigned>(seed), key1 = static_cast<unsigned>(seed >> 32);
#pragma unroll
  for (int round = 0; round < philox::kRounds; ++round) {
    const unsigned long long product0 = static_cast<unsigned long long>(philox::kFactor0) * c0;
    const unsigned long long product1 = static_cast<unsigned long long>(philox::kFactor1) * c2;
    c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<unsigned>(product1);
    c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<unsigned>(product0);
    key0 += philox::kStep0;
    key1 += philox::kStep1;
  }
  return {{c0, c1, c2, c3}};
}

// One group's place, and what it takes and gives besides the gradients.
template <class T>
struct DropGroup {
  static constexpr int width = kGroup<T>;
  using W = Wide<T>;
  const Table& table;
  const Drop& drop;
  int entry, left;
  long long at;  // of the group's first element in its tensor

  __device__ int bytes(int shift) const { return table.tag(entry) >> shift & 255; }
  __device__ const T* row(int k) const {
    const T* first = k < drop.num_tasks ? table.row<const T>(entry, k) : nullptr;
    return first ? first + at : nullptr;
  }
  // The given numbers in row K + i; false if there are none.
  __device__ bool given(int i, Group<W, width> (&numbers)[1]) const {
    const W* first = table.row<const W>(entry, drop.num_tasks + i);
    if (!first) return false;
    const W* const from[1] = {first + at};
    load_groups(from, left, bytes(16), numbers);
    return true;
  }
  __device__ void uniform(Group<W, width> (&numbers)[1]) const {
    if (drop.form == Dropping::Given) {
      given(2, numbers);
      return;
    }
    const unsigned long long seed = *drop.seed, first = table.words[table.at(entry) + 2 + drop.num_tasks + 1] + at;
    RandomWords words = random_words(seed, first / 4);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const int place = static_cast<int>((first + e) % 4);
      if (e > 0 && place == 0) words = random_words(seed, (first + e) / 4);
      numbers[0].element[e] = static_cast<W>(static_cast<float>(words.at(place) >> 9 << 1 | 1u) * philox::kUnit);
    }
  }
  template <class Out>
  __device__ void store(const Group<Out, width>& result) const {
    store_group(result, table.row<Out>(entry, drop.num_tasks) + at, left, bytes(8));
  }
};

// Calls use(group) for each group of this thread.
template <class T, class Use>
__device__ inline void for_each_drop_group(const Table& table, const Drop& drop, Use use) {
  for (long long chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    const Piece piece = piece_of(table, static_cast<int>(chunk));
    for (int column = thread() * kGroup<T>; column < piece.n; column += kThreads * kGroup<T>)
      use(DropGroup<T>{table, drop, piece.entry, piece.n - column, piece.begin + column});
  }
}

// Grid: any; block: kThreads.
template <class T, bool Leak>
__global__ void __launch_bounds__(kThreads) grad_drop_kernel(const Table __grid_constant__ table, const Drop drop) {
  constexpr int width = kGroup<T>;
  using W = Wide<T>;
  for_each_drop_group<T>(table, drop, [&](const DropGroup<T>& group) {
    double positive[width] = {}, negative[width] = {};
    double leak_positive[Leak ? width : 1] = {}, leak_negative[Leak ? width : 1] = {};
    for (int k = 0; k < drop.num_tasks; k += kRowsOfDrop) {
      const T* from[kRowsOfDrop];
      Group<T> rows[kRowsOfDrop];
#pragma unroll
      for (int i = 0; i < kRowsOfDrop; ++i) from[i] = group.row(k + i);
      load_groups(from, group.left, group.bytes(0), rows);
#pragma unroll
      for (int i = 0; i < kRowsOfDrop; ++i) {
        if (!from[i]) continue;
        const double leak = Leak ? drop.leak[k + i] : 0;
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const double g = widen_to<double>(rows[i].element[e]), above = g > 0 ? g : 0, below = g - above;
          positive[e] += above;
          negative[e] += below;
          if constexpr (Leak) leak_positive[e] += leak * above, leak_negative[e] += leak * below;
        }
      }
    }
    const bool draws = drop.form == Dropping::Drawn || drop.form == Dropping::Given;
    Group<W, width> u[1], threshold[1], purity;
    Group<T> kept;
    const bool has_threshold = group.given(3, threshold);
    if (draws) group.uniform(u);
#pragma unroll
    for (int e = 0; e < width; ++e) {
      const double s = positive[e], r = negative[e], total = s - r, wrong = total - total;
      const double leak_s = Leak ? leak_positive[Leak ? e : 0] : 0, leak_r = Leak ? leak_negative[Leak ? e : 0] : 0;
      if (draws) {
        const double most = has_threshold ? widen_to<double>(threshold[0].element[e]) : s;
        const double least = widen_to<double>(u[0].element[e]) * (has_threshold ? 1 : total);
        narrow((most > least ? s : leak_s) + (most < least ? r : leak_r) + wrong, kept.element[e]);
        continue;
      }
      const double p = has_threshold ? widen_to<double>(threshold[0].element[e]) : total == 0 ? 0.5 : s / total;
      narrow(p + wrong, purity.element[e]);
      const double share = p < 0 ? 0 : p > 1 ? 1 : p, rest = 1 - share;
      narrow(share * s + rest * leak_s + rest * r + share * leak_r + wrong, kept.element[e]);
    }
    if (drop.form == Dropping::Purity)
      group.store(purity);
    else
      group.store(kept);
  });
}

__device__ inline float times(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double times(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float plus(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double plus(double a, double b) { return __dadd_rn(a, b); }

// The same with every operation rounded to T, float or double. Without the bound of two blocks the compiler would spill
// to have four. Grid: any; block: kThreads.
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    grad_drop_rounding_kernel(const Table __grid_constant__ table, const Drop drop) {
  constexpr int width = kGroup<T>, kSummed = 16;  // tasks whose sum is added to the others' sums
  for_each_drop_group<T>(table, drop, [&](const DropGroup<T>& group) {
    T sum[width] = {}, size[width] = {}, if_positive[width] = {}, if_negative[width] = {}, if_neither[width] = {};
    for (int first = 0; first < drop.num_tasks; first += kSummed) {
      T some[width] = {}, some_size[width] = {};
      for (int k = first; k < drop.num_tasks && k < first + kSummed; ++k) {
        const T* const from[1] = {group.row(k)};
        Group<T> rows[1];
        load_groups(from, group.left, group.bytes(0), rows);
        // The factors of a gradient that is kept, and of one that is not.
        const T rest = drop.leak ? static_cast<T>(drop.leak[k]) : 0, whole = plus(rest, plus(1, -rest));
#pragma unroll
        for (int e = 0; e < width; ++e) {
          const T g = rows[0].element[e];
          some[e] = plus(some[e], g);
          some_size[e] = plus(some_size[e], g < 0 ? -g : g);
          if_positive[e] = plus(if_positive[e], times(g > 0 ? whole : rest, g));
          if_negative[e] = plus(if_negative[e], times(g < 0 ? whole : rest, g));
          if_neither[e] = plus(if_neither[e], times(rest, g));
        }
      }
#pragma unroll
      for (int e = 0; e < width; ++e) sum[e] = plus(sum[e], some[e]), size[e] = plus(size[e], some_size[e]);
    }
    Group<T> u[1], p[1], kept;
    if (!group.given(3, p))
#pragma unroll
      for (int e = 0; e < width; ++e) p[0].element[e] = times(T(0.5), plus(1, sum[e] / size[e]));
    if (drop.form == Dropping::Purity) {
      group.store(p[0]);
      return;
    }
    group.uniform(u);
#pragma unroll
    for (int e = 0; e < width; ++e)
      kept.element[e] = p[0].element[e] > u[0].element[e]   ? if_positive[e]
                        : p[0].element[e] < u[0].element[e] ? if_negative[e]
                                                            : if_neither[e];
    group.store(kept);
  });
}

}  // namespace mtlfast::cuda

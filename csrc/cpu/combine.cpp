// out[r] (+)= sum_k coefficients[r, k] * g_k over a range of columns: one read of the K rows, one write of R.
//
// The kernel takes eight rows at a time and keeps the sums of a block in the first-level cache meanwhile. So at most
// eight streams are open at once; one pass over all rows had half the speed at K = 32. An element is written only after
// all groups of rows have read it, so that out may be one of the rows. With R > 1 the block is short enough for its K
// rows to stay in the cache while all R outputs are computed.
//
// Work: R*K multiply-adds for each column. Weights, products and sums are double for every dtype, because the update
// can be far shorter than the gradients that cancel in it. Sums run over the tasks in ascending order and are rounded
// once to the output. So they are deterministic and do not depend on an element's address.
//
// Outputs of another dtype than the gradients' take the path `combine_to`, which is short rather than fast.
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int kGroup = 8;
constexpr int64_t kOutGroup = 4;        // outputs made at once when R > 1: a row is loaded once for them
constexpr int64_t kSingleBlock = 2048;  // columns of a block when R = 1: its sums fill half the cache
constexpr int64_t kManyBlock = kSingleBlock / kOutGroup;  // and when R > 1
constexpr int64_t kMostStep = 64;                         // no Widened<T>::kStep is larger

// Several outputs of a block: their weights, their sums so far, and their destinations.
template <class T>
struct Outputs {
  const double* weights;  // [outputs, K]
  int64_t num_tasks;      // K, from one output's weights to the next's
  F64* sums;              // [outputs, kManyBlock], or [kSingleBlock] for one
  T* const* to;           // [outputs]
  bool accumulate;
};

// Adds the rows first .. first + Rows over n columns, a multiple of the step, to Outs outputs. First: the sums start
// with these rows. Last: the sums are written. Ahead: prefetch these rows of the block after the next.
template <class T, int Outs, int Rows, bool First, bool Last>
void pass(const T* const* rows, int64_t first, int64_t n, const Outputs<T>& out, bool ahead) {
  using S = Widened<T>;
  double weights[Outs][Rows];
  for (int r = 0; r < Outs; ++r)
    for (int i = 0; i < Rows; ++i) weights[r][i] = out.weights[r * out.num_tasks + first + i];
  F64* sums = out.sums;
  for (int64_t c = 0; c < n; c += S::kStep, sums += S::kParts) {
    if (ahead && c * sizeof(T) % 64 == 0)  // once a cache line
      for (int i = 0; i < Rows; ++i)
        __builtin_prefetch(reinterpret_cast<const char*>(rows[first + i]) + (c + 2 * n) * sizeof(T), 0, 2);
    F64 v[Outs][S::kParts];
#pragma GCC unroll 4
    for (int part = 0; part < S::kParts; ++part) {
      F64 row[Rows];
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) row[i] = S::load(rows[first + i] + c, part);
#pragma GCC unroll 4
      for (int r = 0; r < Outs; ++r) {
        F64* sum = sums + r * (kManyBlock * S::kParts / S::kStep) + part;
        v[r][part] = First ? weights[r][0] * row[0] : *sum + weights[r][0] * row[0];
#pragma GCC unroll 8
        for (int i = 1; i < Rows; ++i) v[r][part] += weights[r][i] * row[i];
        if (Last && out.accumulate) v[r][part] += S::load(out.to[r] + c, part);
        if (!Last) *sum = v[r][part];
      }
    }
    if (Last)
#pragma GCC unroll 4
      for (int r = 0; r < Outs; ++r) S::store(out.to[r] + c, v[r]);
  }
}

// Adds the last `count` <= Rows rows, and writes the sums.
template <class T, int Outs, bool First, int Rows = kGroup>
void last_pass(const T* const* rows, int64_t first, int64_t count, int64_t n, const Outputs<T>& out, bool ahead) {
  if constexpr (Rows > 1)
    if (count < Rows) return last_pass<T, Outs, First, Rows - 1>(rows, first, count, n, out, ahead);
  pass<T, Outs, Rows, First, true>(rows, first, n, out, ahead);
}

// Adds all `count` rows over n columns, a multiple of the step and at most a block. Every `turns`-th group of rows,
// from `turn` on, is prefetched (turns = 0: none).
template <class T, int Outs>
void weighted_sum(const T* const* rows, int64_t count, int64_t n, const Outputs<T>& out, int64_t turn, int64_t turns) {
  const auto ahead = [&](int64_t k) { return turns > 0 && k / kGroup % turns == turn; };
  if (count <= kGroup) return last_pass<T, Outs, true>(rows, 0, count, n, out, ahead(0));
  pass<T, Outs, kGroup, true, false>(rows, 0, n, out, ahead(0));
  int64_t k = kGroup;
  for (; count - k > kGroup; k += kGroup) pass<T, Outs, kGroup, false, false>(rows, k, n, out, ahead(k));
  last_pass<T, Outs, false>(rows, k, count - k, n, out, ahead(k));
}

// The scratch memory of one range.
template <class T>
struct Scratch {
  F64* sums;            // [kSingleBlock], or [kOutGroup, kManyBlock]
  const T** rows;       // [K] where the present tasks' rows of this block begin
  const T** tail_rows;  // [K] where their padded tails are
  T* tail;              // [K + kOutGroup, step] what is left of each row and of the outputs, padded
  double* weights;      // [R, K] of the present tasks

  static int64_t bytes(int64_t K, int64_t R) {
    return kSingleBlock * 8 + 2 * round_up(K * 8, 64) + (K + kOutGroup) * kMostStep * 8 + R * K * 8;
  }
  Scratch(void* memory, int64_t K) {
    char* p = static_cast<char*>(memory);
    sums = reinterpret_cast<F64*>(p);
    rows = reinterpret_cast<const T**>(p += kSingleBlock * 8);
    tail_rows = reinterpret_cast<const T**>(p += round_up(K * 8, 64));
    tail = reinterpret_cast<T*>(p += round_up(K * 8, 64));
    weights = reinterpret_cast<double*>(p + (K + kOutGroup) * kMostStep * 8);
  }

  // Copies the last n < step elements of each row, from `from` on, and pads them with zeros. So every element goes
  // through the same arithmetic.
  void pad_tails(int64_t count, int64_t from, int64_t n) const {
    constexpr int step = Widened<T>::kStep;
    __builtin_memset(tail, 0, (count + kOutGroup) * step * sizeof(T));
    for (int64_t k = 0; k < count; ++k) {
      __builtin_memcpy(tail + k * step, rows[k] + from, n * sizeof(T));
      tail_rows[k] = tail + k * step;
    }
  }
};

// Computes Outs outputs over one block of n columns: whole steps from the rows, the rest from their padded tails.
template <class T, int Outs>
void combine_block(const Scratch<T>& s, int64_t count, int64_t n, Outputs<T> out, T* const* to, int64_t turn,
                   int64_t turns) {
  constexpr int step = Widened<T>::kStep;
  const int64_t whole = n / step * step;
  T* rest[Outs];
  out.to = to;
  if (whole > 0) weighted_sum<T, Outs>(s.rows, count, whole, out, turn, turns);
  if (whole == n) return;
  for (int r = 0; r < Outs; ++r) {
    rest[r] = s.tail + (count + r) * step;
    if (out.accumulate) __builtin_memcpy(rest[r], to[r] + whole, (n - whole) * sizeof(T));
  }
  out.to = rest;
  weighted_sum<T, Outs>(s.tail_rows, count, step, out, 0, 0);
  for (int r = 0; r < Outs; ++r) __builtin_memcpy(to[r] + whole, rest[r], (n - whole) * sizeof(T));
}

template <class T>
void combine_range(const TaskView& grads, int64_t begin, int64_t end, const double* coefficients, int64_t R,
                   bool accumulate, void* scratch, void* const* out) {
  const int64_t K = grads.num_tasks, block = R == 1 ? kSingleBlock : kManyBlock, step = Widened<T>::kStep;
  const Scratch<T> s(scratch, K);
  for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t length) {
    const void* const* data = grads.tensor(t);
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    int64_t count = 0;
    for (int64_t k = 0; k < K; ++k)
      if (data[k]) {
        for (int64_t r = 0; r < R; ++r) s.weights[r * K + count] = coefficients[(r + grads.group(t)) * K + k];
        ++count;
      }
    for (int64_t at = first; at < first + length; at += block) {
      const int64_t n = first + length - at < block ? first + length - at : block, whole = n / step * step;
      int64_t present = 0;
      for (int64_t k = 0; k < K; ++k)
        if (data[k]) s.rows[present++] = static_cast<const T*>(data[k]) + at;
      if (whole < n) s.pad_tails(count, whole, n - whole);
      for (int64_t r = 0, outs; r < R; r += outs) {
        outs = R - r < kOutGroup ? 1 : kOutGroup;
        T* to[kOutGroup];
        for (int64_t i = 0; i < outs; ++i) to[i] = static_cast<T*>(out[t]) + (r + i) * numel + at;
        const Outputs<T> outputs{s.weights + r * K, K, s.sums, nullptr, accumulate};
        if (outs == 1)
          combine_block<T, 1>(s, count, n, outputs, to, 0, R == 1 && count > kGroup ? 1 : 0);
        else
          combine_block<T, kOutGroup>(s, count, n, outputs, to, r / kOutGroup, R / kOutGroup);
      }
    }
  });
}

// Computes outputs of another dtype. `sums` ([R, kManyBlock]) holds a block's sums of all R outputs while each of its
// rows is read once.
template <class T, class Out>
void combine_to(const TaskView& grads, int64_t begin, int64_t end, const double* coefficients, int64_t R,
                bool accumulate, double* sums, void* const* out) {
  const int64_t K = grads.num_tasks;
  double wide[kStage];
  const auto for_each_stage = [](int64_t n, auto use) {
    for (int64_t c = 0; c < n; c += kStage) use(c, n - c < kStage ? n - c : kStage);
  };
  for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t length) {
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    for (int64_t at = first; at < first + length; at += kManyBlock) {
      const int64_t n = first + length - at < kManyBlock ? first + length - at : kManyBlock;
      bool starts = true;
      for (int64_t k = 0; k < K; ++k) {
        const T* row = static_cast<const T*>(grads.tensor(t)[k]);
        if (!row) continue;
        for_each_stage(n, [&](int64_t c, int64_t count) {
          unpack_stage(row + at + c, count, wide);
          for (int64_t r = 0; r < R; ++r) {
            const double weight = coefficients[(r + grads.group(t)) * K + k];
            double* sum = sums + r * kManyBlock + c;
            if (starts)
              for (int64_t i = 0; i < kStage; ++i) sum[i] = weight * wide[i];
            else
              for (int64_t i = 0; i < kStage; ++i) sum[i] += weight * wide[i];
          }
        });
        starts = false;
      }
      for (int64_t r = 0; r < R; ++r) {
        Out* to = static_cast<Out*>(out[t]) + r * numel + at;
        for_each_stage(n, [&](int64_t c, int64_t count) {
          double* sum = sums + r * kManyBlock + c;
          if (accumulate) {
            unpack_stage(to + c, count, wide);
            for (int64_t i = 0; i < kStage; ++i) sum[i] += wide[i];
          }
          pack_stage(sum, count, to + c);
        });
      }
    }
  });
}

}  // namespace

int64_t combine_scratch(int64_t num_tasks, int64_t num_out) {
  const int64_t same = Scratch<double>::bytes(num_tasks, num_out), other = num_out * kManyBlock * 8;
  return same > other ? same : other;
}

void combine(const TaskView& grads, int64_t begin, int64_t end, const double* coefficients, int64_t num_out,
             DType out_dtype, bool accumulate, void* scratch, void* const* out) {
  visit(grads.dtype, [&]<class T>(T) {
    if (out_dtype == grads.dtype)
      return combine_range<T>(grads, begin, end, coefficients, num_out, accumulate, scratch, out);
    visit(out_dtype, [&]<class Out>(Out) {
      combine_to<T, Out>(grads, begin, end, coefficients, num_out, accumulate, static_cast<double*>(scratch), out);
    });
  });
}

}  // namespace mtlfast::MTLFAST_ISA

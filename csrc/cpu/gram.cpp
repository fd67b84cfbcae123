// G = J J^T over a range of columns: one read of the K rows.
//
// A block of at most 512 columns stays in the first-level cache while every pair of rows is multiplied. Rows go in
// strips of four: the strip's own triangle first (it brings the strip's rows from memory, four streams at once), then
// rectangles of the strip against the rows before it. A tile keeps its sums in vector registers for one block, at most
// 64 float adds a lane, then adds them as doubles to the chunk's sums. fp64 rows are summed in fp64 throughout.
//
// Work: K(K+1)/2 multiply-adds a column. Deterministic: block borders depend on the column alone, lanes and pairs are
// added in a fixed order, and the caller adds the ranges in order.
//
// Lost when tried in a prototype: packing the rows first, five-row tiles, blocks longer than 512 columns.
#include "blocks.h"
#include "kernels.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int kSumLanes = MTLFAST_VECTOR_BYTES / 8;  // doubles a pair's running sum is kept in
constexpr int kStripRows = 4;
constexpr int kTileColumns = MTLFAST_VECTOR_BYTES == 64 ? 4 : 3;  // 32 registers hold a 4 x 4 tile, 16 a 4 x 3

MTLFAST_INLINE void add_to(double* sum, F64 v) { store_unaligned(sum, load_unaligned<F64>(sum) + v); }

// sums[i, j] += sum over n columns of a[i] * b[j]; on the diagonal a is b and j <= i.
// Unroll: sets of accumulators, so that small tiles keep both multiply-add units busy.
template <class T, int Rows, int Columns, bool Diagonal, int Unroll>
MTLFAST_INLINE void tile(const T* const* a, const T* const* b, int64_t n, double* const* sums) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  static_assert(kGrain % (Unroll * S::kStep) == 0, "a block is a multiple of kGrain columns");
  Vec acc[Unroll][Rows][Columns] = {};
  for (int64_t c = 0; c < n; c += Unroll * S::kStep) {
#pragma GCC unroll 4
    for (int u = 0; u < Unroll; ++u) {
#pragma GCC unroll 2
      for (int part = 0; part < S::kParts; ++part) {
        Vec right[Columns];
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) right[j] = S::load(b[j] + c + u * S::kStep, part);
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
          const Vec left = Diagonal ? right[i] : S::load(a[i] + c + u * S::kStep, part);
#pragma GCC unroll 4
          for (int j = 0; j < (Diagonal ? i + 1 : Columns); ++j) acc[u][i][j] += left * right[j];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < (Diagonal ? i + 1 : Columns); ++j) {
      F64 total = fold_to_double(acc[0][i][j]);
#pragma GCC unroll 4
      for (int u = 1; u < Unroll; ++u) total += fold_to_double(acc[u][i][j]);
      add_to(sums[i] + j * kSumLanes, total);
    }
}

template <class T, int Rows>
void triangle(const T* const* rows, int64_t n, double* const* sums) {
  constexpr int unroll = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  constexpr int most = kGrain / Simd<T>::kStep;
  tile<T, Rows, Rows, true, (unroll < most ? unroll : most)>(rows, rows, n, sums);
}

template <class T, int Rows, int Columns>
void rectangle(const T* const* a, const T* const* b, int64_t n, double* const* sums) {
  constexpr int most = kGrain / Simd<T>::kStep, unroll = Rows * Columns <= 4 ? 2 : 1;
  tile<T, Rows, Columns, false, (unroll < most ? unroll : most)>(a, b, n, sums);
}

// One strip of Rows rows from row `first`: its triangle, then rectangles against the rows before it.
template <class T, int Rows>
void strip(const T* const* rows, int64_t first, int64_t n, double* pair_sums) {
  double* sums[Rows];
  for (int i = 0; i < Rows; ++i) sums[i] = pair_sums + (num_pairs(first + i) + first) * kSumLanes;
  triangle<T, Rows>(rows + first, n, sums);
  for (int64_t j = 0; j < first; j += kTileColumns) {
    for (int i = 0; i < Rows; ++i) sums[i] = pair_sums + (num_pairs(first + i) + j) * kSumLanes;
    switch (first - j) {
      case 1:
        rectangle<T, Rows, 1>(rows + first, rows + j, n, sums);
        break;
      case 2:
        rectangle<T, Rows, 2>(rows + first, rows + j, n, sums);
        break;
      case 3:
        rectangle<T, Rows, 3>(rows + first, rows + j, n, sums);
        break;
      default:
        rectangle<T, Rows, kTileColumns>(rows + first, rows + j, n, sums);
        break;
    }
  }
}

void fold_lanes(const double* lanes, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int lane = 0; lane < kSumLanes; ++lane) total += lanes[i * kSumLanes + lane];
    sums[i] = total;
  }
}

int64_t lanes_bytes(int64_t count) { return round_up(count * kSumLanes * 8, 64); }

}  // namespace

int64_t gram_scratch(int64_t num_tasks) { return lanes_bytes(num_pairs(num_tasks)) + blocks_scratch(num_tasks); }

void gram(const TaskView& grads, int64_t begin, int64_t end, void* scratch, double* sums) {
  const int64_t K = grads.num_tasks, pairs = num_pairs(K);
  double* lanes = static_cast<double*>(scratch);
  __builtin_memset(lanes, 0, lanes_bytes(pairs));
  visit(grads.dtype, [&]<class T>(T) {
    for_each_block<T>(grads, begin, end, static_cast<char*>(scratch) + lanes_bytes(pairs),
                      [&](const T* const* rows, int64_t n) {
                        int64_t first = 0;
                        for (; first + kStripRows <= K; first += kStripRows)
                          strip<T, kStripRows>(rows, first, n, lanes);
                        switch (K - first) {
                          case 1:
                            strip<T, 1>(rows, first, n, lanes);
                            break;
                          case 2:
                            strip<T, 2>(rows, first, n, lanes);
                            break;
                          case 3:
                            strip<T, 3>(rows, first, n, lanes);
                            break;
                        }
                      });
  });
  fold_lanes(lanes, pairs, sums);
}

void square_sums(const TaskView& grads, int64_t begin, int64_t end, void* scratch, double* sums) {
  const int64_t K = grads.num_tasks;
  double* lanes = static_cast<double*>(scratch);
  __builtin_memset(lanes, 0, lanes_bytes(K));
  visit(grads.dtype, [&]<class T>(T) {
    for_each_block<T>(grads, begin, end, static_cast<char*>(scratch) + lanes_bytes(K),
                      [&](const T* const* rows, int64_t n) {
                        for (int64_t k = 0; k < K; ++k) {
                          double* sum = lanes + k * kSumLanes;
                          triangle<T, 1>(rows + k, n, &sum);
                        }
                      });
  });
  fold_lanes(lanes, K, sums);
}

}  // namespace mtlfast::MTLFAST_ISA

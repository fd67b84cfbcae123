// G = J J^T over a range of columns: one read of the K rows.
//
// A block of columns stays in the caches while every pair of rows is multiplied. Rows go in strips of four: the strip's
// own triangle first, then rectangles of the strip against the rows before it. A tile keeps its sums in vector
// registers for one block, at most 64 float adds a lane, then adds them as doubles to the chunk's sums. fp64 rows are
// summed in fp64 throughout. Up to six rows the processor's own prefetching keeps up; beyond, every tile asks for a
// share of the rows two blocks ahead, so that memory works while tiles multiply.
//
// Work: K(K+1)/2 multiply-adds a column. Deterministic: block borders depend on the column alone, lanes and pairs are
// added in a fixed order, and the caller adds the ranges in order.
//
// Lost when tried: packing the rows first, tiles of five rows, prefetching into the first-level cache (K = 8: 80 % of
// one-stream bandwidth against 92 into the second), one block ahead (K = 16: 79 % against 82), prefetching at K <= 6.
#include "blocks.h"
#include "kernels.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int kSumLanes = MTLFAST_VECTOR_BYTES / 8;  // doubles a pair's running sum is kept in
constexpr int kStripRows = 4;
constexpr int kOwnPrefetch = 6;                                   // rows that need no help
constexpr int kTileColumns = MTLFAST_VECTOR_BYTES == 64 ? 4 : 3;  // 32 registers hold a 4 x 4 tile, 16 a 4 x 3

// Some rows' memory two blocks ahead, for one tile to bring closer while it works.
struct Ahead {
  const char* rows[4];
  int count;
};

// Deals the K rows of a block out to its tiles.
template <class T>
class AheadOfTiles {
 public:
  AheadOfTiles(const T* const* rows, int64_t K, int64_t n, bool in_place) : rows_(rows), distance_(2 * n), left_(K) {
    int64_t tiles = 0;
    for (int64_t first = 0; first < K; first += kStripRows) tiles += 1 + (first + kTileColumns - 1) / kTileColumns;
    each_ = !in_place || K <= kOwnPrefetch ? 0 : static_cast<int>((K + tiles - 1) / tiles);
  }
  Ahead next() {
    Ahead ahead{{}, 0};
    for (; ahead.count < each_ && left_ > 0; --left_)
      ahead.rows[ahead.count++] = reinterpret_cast<const char*>(*rows_++) + distance_ * sizeof(T);
    return ahead;
  }

 private:
  const T* const* rows_;
  int64_t distance_, left_;
  int each_;  // at most 4: K rows have at least K / 4 tiles
};

MTLFAST_INLINE void add_to(double* sum, F64 v) { store_unaligned(sum, load_unaligned<F64>(sum) + v); }

// sums[i, j] += sum over n columns of a[i] * b[j]; on the diagonal a is b and j <= i.
// Unroll: sets of accumulators, so that small tiles keep both multiply-add units busy.
template <class T, int Rows, int Columns, bool Diagonal, int Unroll>
MTLFAST_INLINE void tile(const T* const* a, const T* const* b, int64_t n, double* const* sums, const Ahead& ahead) {
  using S = Simd<T>;
  using Vec = typename S::Vec;
  static_assert(kGrain % (Unroll * S::kStep) == 0, "a block is a multiple of kGrain columns");
  Vec acc[Unroll][Rows][Columns] = {};
  for (int64_t c = 0; c < n; c += Unroll * S::kStep) {
    for (int row = 0; row < ahead.count; ++row)
      __builtin_prefetch(ahead.rows[row] + c * sizeof(T), 0, 2);  // to the second-level cache
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
void triangle(const T* const* rows, int64_t n, double* const* sums, const Ahead& ahead) {
  constexpr int unroll = Rows == 1 ? 4 : Rows <= 3 ? 2 : 1;
  constexpr int most = kGrain / Simd<T>::kStep;
  tile<T, Rows, Rows, true, (unroll < most ? unroll : most)>(rows, rows, n, sums, ahead);
}

template <class T, int Rows, int Columns>
void rectangle(const T* const* a, const T* const* b, int64_t n, double* const* sums, const Ahead& ahead) {
  constexpr int most = kGrain / Simd<T>::kStep, unroll = Rows * Columns <= 4 ? 2 : 1;
  tile<T, Rows, Columns, false, (unroll < most ? unroll : most)>(a, b, n, sums, ahead);
}

// One strip of Rows rows from row `first`: its triangle, then rectangles against the rows before it.
template <class T, int Rows>
void strip(const T* const* rows, int64_t first, int64_t n, double* pair_sums, AheadOfTiles<T>& ahead) {
  double* sums[Rows];
  for (int i = 0; i < Rows; ++i) sums[i] = pair_sums + (num_pairs(first + i) + first) * kSumLanes;
  triangle<T, Rows>(rows + first, n, sums, ahead.next());
  for (int64_t j = 0; j < first; j += kTileColumns) {
    for (int i = 0; i < Rows; ++i) sums[i] = pair_sums + (num_pairs(first + i) + j) * kSumLanes;
    switch (first - j) {
      case 1:
        rectangle<T, Rows, 1>(rows + first, rows + j, n, sums, ahead.next());
        break;
      case 2:
        rectangle<T, Rows, 2>(rows + first, rows + j, n, sums, ahead.next());
        break;
      case 3:
        rectangle<T, Rows, 3>(rows + first, rows + j, n, sums, ahead.next());
        break;
      default:
        rectangle<T, Rows, kTileColumns>(rows + first, rows + j, n, sums, ahead.next());
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

int64_t gram_scratch(int64_t num_tasks, DType dtype) {
  return lanes_bytes(num_pairs(num_tasks)) + blocks_scratch(num_tasks, dtype);
}

void gram(const TaskView& grads, int64_t begin, int64_t end, void* scratch, double* sums) {
  const int64_t K = grads.num_tasks, pairs = num_pairs(K);
  double* lanes = static_cast<double*>(scratch);
  __builtin_memset(lanes, 0, lanes_bytes(pairs));
  visit(grads.dtype, [&]<class T>(T) {
    for_each_block<T>(grads, begin, end, static_cast<char*>(scratch) + lanes_bytes(pairs),
                      [&](const T* const* rows, int64_t n, bool in_place) {
                        AheadOfTiles<T> ahead(rows, K, n, in_place);
                        int64_t first = 0;
                        for (; first + kStripRows <= K; first += kStripRows)
                          strip<T, kStripRows>(rows, first, n, lanes, ahead);
                        switch (K - first) {
                          case 1:
                            strip<T, 1>(rows, first, n, lanes, ahead);
                            break;
                          case 2:
                            strip<T, 2>(rows, first, n, lanes, ahead);
                            break;
                          case 3:
                            strip<T, 3>(rows, first, n, lanes, ahead);
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
                      [&](const T* const* rows, int64_t n, bool) {
                        for (int64_t k = 0; k < K; ++k) {
                          double* sum = lanes + k * kSumLanes;
                          triangle<T, 1>(rows + k, n, &sum, Ahead{{}, 0});
                        }
                      });
  });
  fold_lanes(lanes, K, sums);
}

}  // namespace mtlfast::MTLFAST_ISA

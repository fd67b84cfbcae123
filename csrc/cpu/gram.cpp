// G = J J^T over a range of columns: one read of the K rows.
//
// A block of columns stays in the caches while every pair of rows is multiplied. Rows go in strips of four: the strip's
// own triangle first, then rectangles of the strip against the rows before it. A tile keeps its sums in vector
// registers for one block, at most 64 float adds a lane, then adds them as doubles to the chunk's sums. fp64 rows are
// summed in fp64 throughout. Up to six rows the processor's own prefetching keeps up; beyond, every tile asks for a
// share of the rows two blocks ahead, so that memory works while tiles multiply.
//
// Exact sums of narrower rows: elements become doubles, whose products of floats are exact, and are summed as fp64 rows
// are. Few rows are converted by the tiles' loads: up to 16 of float32, 4 of the 16-bit formats, whose conversion takes
// longer. Of more rows, whose elements many tiles load, 128 columns at a time are converted into the first-level cache.
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
template <class T>
constexpr int64_t kAsLoaded = sizeof(T) == 4 ? 16 : kStripRows;  // rows that a tile's loads convert to double
constexpr int64_t kWidened = 128;                                // columns that are doubles at a time
constexpr int64_t kExactRun = 32768;  // columns whose exact sums go one after the other: 256 adds of 128 columns

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
// S: Simd<T> or Widened<T>. Unroll x Sets: sets of accumulators, one for each of `Sets` parts of a step, so that small
// tiles keep both multiply-add units busy.
template <class S, int Rows, int Columns, bool Diagonal, int Unroll, int Sets = 1, class T = typename S::Element>
MTLFAST_INLINE void tile(const T* const* a, const T* const* b, int64_t n, double* const* sums, const Ahead& ahead) {
  using Vec = typename S::Vec;
  static_assert(kGrain % (Unroll * S::kStep) == 0, "a block is a multiple of kGrain columns");
  Vec acc[Unroll * Sets][Rows][Columns] = {};
  for (int64_t c = 0; c < n; c += Unroll * S::kStep) {
    for (int row = 0; row < ahead.count; ++row)
      __builtin_prefetch(ahead.rows[row] + c * sizeof(T), 0, 2);  // to the second-level cache
#pragma GCC unroll 4
    for (int u = 0; u < Unroll; ++u) {
#pragma GCC unroll 4
      for (int part = 0; part < S::kParts; ++part) {
        Vec right[Columns];
#pragma GCC unroll 4
        for (int j = 0; j < Columns; ++j) right[j] = S::load(b[j] + c + u * S::kStep, part);
#pragma GCC unroll 4
        for (int i = 0; i < Rows; ++i) {
          const Vec left = Diagonal ? right[i] : S::load(a[i] + c + u * S::kStep, part);
#pragma GCC unroll 4
          for (int j = 0; j < (Diagonal ? i + 1 : Columns); ++j) acc[u * Sets + part % Sets][i][j] += left * right[j];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < (Diagonal ? i + 1 : Columns); ++j) {
      F64 total = fold_to_double(acc[0][i][j]);
#pragma GCC unroll 8
      for (int u = 1; u < Unroll * Sets; ++u) total += fold_to_double(acc[u][i][j]);
      add_to(sums[i] + j * kSumLanes, total);
    }
}

template <class S, int Rows, class T = typename S::Element>
void triangle(const T* const* rows, int64_t n, double* const* sums, const Ahead& ahead) {
  constexpr int sets = S::kParts == 4 && Rows <= 2 ? 4 : 1;
  constexpr int unroll = (Rows == 1 ? 4 : Rows <= 3 ? 2 : 1) / (sets > 1 ? 2 : 1);
  constexpr int most = kGrain / S::kStep;
  tile<S, Rows, Rows, true, (unroll < most ? unroll : most), sets>(rows, rows, n, sums, ahead);
}

template <class S, int Rows, int Columns, class T = typename S::Element>
void rectangle(const T* const* a, const T* const* b, int64_t n, double* const* sums, const Ahead& ahead) {
  constexpr int most = kGrain / S::kStep, unroll = Rows * Columns <= 4 ? 2 : 1;
  tile<S, Rows, Columns, false, (unroll < most ? unroll : most)>(a, b, n, sums, ahead);
}

// One strip of Rows rows from row `first`: its triangle, then rectangles against the rows before it.
template <class S, int Rows, class T = typename S::Element>
void strip(const T* const* rows, int64_t first, int64_t n, double* pair_sums, AheadOfTiles<T>& ahead) {
  double* sums[Rows];
  for (int i = 0; i < Rows; ++i) sums[i] = pair_sums + (num_pairs(first + i) + first) * kSumLanes;
  triangle<S, Rows>(rows + first, n, sums, ahead.next());
  for (int64_t j = 0; j < first; j += kTileColumns) {
    for (int i = 0; i < Rows; ++i) sums[i] = pair_sums + (num_pairs(first + i) + j) * kSumLanes;
    switch (first - j) {
      case 1:
        rectangle<S, Rows, 1>(rows + first, rows + j, n, sums, ahead.next());
        break;
      case 2:
        rectangle<S, Rows, 2>(rows + first, rows + j, n, sums, ahead.next());
        break;
      case 3:
        rectangle<S, Rows, 3>(rows + first, rows + j, n, sums, ahead.next());
        break;
      default:
        rectangle<S, Rows, kTileColumns>(rows + first, rows + j, n, sums, ahead.next());
        break;
    }
  }
}

// All pairs of K rows over n columns, loaded by S.
template <class S, class T = typename S::Element>
void multiply(const T* const* rows, int64_t K, int64_t n, bool in_place, double* lanes) {
  AheadOfTiles<T> ahead(rows, K, n, in_place);
  int64_t first = 0;
  for (; first + kStripRows <= K; first += kStripRows) strip<S, kStripRows>(rows, first, n, lanes, ahead);
  switch (K - first) {
    case 1:
      strip<S, 1>(rows, first, n, lanes, ahead);
      break;
    case 2:
      strip<S, 2>(rows, first, n, lanes, ahead);
      break;
    case 3:
      strip<S, 3>(rows, first, n, lanes, ahead);
      break;
  }
}

// Memory for kWidened columns of K rows as doubles, behind their addresses.
int64_t widened_scratch(int64_t num_tasks) { return round_up(num_tasks * 8, 64) + num_tasks * kWidened * 8; }

// All pairs of K rows, whose elements become doubles a few columns at a time.
template <class T>
void multiply_widened(const T* const* rows, int64_t K, int64_t n, bool in_place, char* scratch, double* lanes) {
  using S = Widened<T>;
  const double** wide_rows = reinterpret_cast<const double**>(scratch);
  double* wide = reinterpret_cast<double*>(scratch + round_up(K * 8, 64));
  for (int64_t k = 0; k < K; ++k) wide_rows[k] = wide + k * kWidened;
  const bool prefetch = in_place && K > kOwnPrefetch;
  for (int64_t begin = 0; begin < n; begin += kWidened) {
    const int64_t columns = n - begin < kWidened ? n - begin : kWidened;
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < columns; c += S::kStep) {
        if (prefetch) __builtin_prefetch(rows[k] + begin + c + 2 * n, 0, 2);
#pragma GCC unroll 4
        for (int part = 0; part < S::kParts; ++part)
          store_unaligned(wide + k * kWidened + c + part * (kLanes / 2), S::load(rows[k] + begin + c, part));
      }
    multiply<Simd<double>>(wide_rows, K, columns, false, lanes);
  }
}

// sums += the lanes of each; clears the lanes.
void fold_lanes(double* lanes, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int lane = 0; lane < kSumLanes; ++lane) total += lanes[i * kSumLanes + lane];
    sums[i] += total;
  }
  __builtin_memset(lanes, 0, count * kSumLanes * 8);
}

int64_t lanes_bytes(int64_t count) { return round_up(count * kSumLanes * 8, 64); }

// Walks the blocks of a range: use(rows, n, in_place, lanes, scratch) adds to the lanes of `count` sums, which come out
// in sums[count]. run: columns after which the lanes are folded, 0: at the end.
template <class T, class Use>
void sum_blocks(const TaskView& grads, int64_t begin, int64_t end, int64_t run, int64_t count, char* scratch,
                double* sums, Use use) {
  double* lanes = reinterpret_cast<double*>(scratch);
  char* blocks = scratch + lanes_bytes(count);
  char* rest = blocks + round_up(blocks_scratch(grads.num_tasks, grads.dtype), 64);
  __builtin_memset(lanes, 0, count * kSumLanes * 8);
  __builtin_memset(sums, 0, count * 8);
  int64_t columns = 0;
  for_each_block<T>(grads, begin, end, blocks, [&](const T* const* rows, int64_t n, bool in_place) {
    use(rows, n, in_place, lanes, rest);
    columns += n;
    if (run > 0 && columns >= run) {
      fold_lanes(lanes, count, sums);
      columns = 0;
    }
  });
  fold_lanes(lanes, count, sums);
}

}  // namespace

int64_t gram_scratch(int64_t num_tasks, DType dtype) {
  return lanes_bytes(num_pairs(num_tasks)) + round_up(blocks_scratch(num_tasks, dtype), 64) +
         widened_scratch(num_tasks);
}

void gram(const TaskView& grads, int64_t begin, int64_t end, bool exact, void* scratch, double* sums) {
  const int64_t K = grads.num_tasks;
  const bool widen = exact && grads.dtype != DType::Float64;
  visit(grads.dtype, [&]<class T>(T) {
    sum_blocks<T>(grads, begin, end, widen ? kExactRun : 0, num_pairs(K), static_cast<char*>(scratch), sums,
                  [&](const T* const* rows, int64_t n, bool in_place, double* lanes, char* rest) {
                    if constexpr (sizeof(T) < 8) {
                      if (widen && K <= kAsLoaded<T>) return multiply<Widened<T>>(rows, K, n, in_place, lanes);
                      if (widen) return multiply_widened(rows, K, n, in_place, rest, lanes);
                    }
                    multiply<Simd<T>>(rows, K, n, in_place, lanes);
                  });
  });
}

void square_sums(const TaskView& grads, int64_t begin, int64_t end, void* scratch, double* sums) {
  const int64_t K = grads.num_tasks;
  visit(grads.dtype, [&]<class T>(T) {
    sum_blocks<T>(grads, begin, end, grads.dtype == DType::Float64 ? 0 : kExactRun, K, static_cast<char*>(scratch),
                  sums, [&](const T* const* rows, int64_t n, bool, double* lanes, char*) {
                    for (int64_t k = 0; k < K; ++k) {
                      double* sum = lanes + k * kSumLanes;
                      triangle<Widened<T>, 1>(rows + k, n, &sum, Ahead{{}, 0});
                    }
                  });
  });
}

}  // namespace mtlfast::MTLFAST_ISA

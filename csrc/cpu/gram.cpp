// G = J J^T over a range of columns: one read of the K rows. With a split, the rows before it against those from it on.
//
// A block of columns stays in the caches while every pair of rows is multiplied. Rows are taken in strips of four:
// first the pairs within the strip, a triangle, then tiles of the strip and the rows before it; with a split, tiles of
// the strip and the rows from the split on. A tile keeps its sums in vector registers for one block, which is at most
// 64 float adds a lane, then adds them as doubles to the chunk's sums. fp64 rows are summed in fp64 throughout. For up
// to six rows the processor's own prefetching is fast enough. For more, every tile prefetches a share of the rows two
// blocks ahead, so that loads and multiplications overlap.
//
// Exact sums: elements are converted to double, in which the product of two floats is exact, and summed as fp64 rows
// are. The tiles convert up to 16 rows of float32 when they load them, and up to 4 rows of the 16-bit formats, whose
// conversion takes longer; with a split, so many on each side. With more rows many tiles load an element, so 128
// columns at a time are converted into the first-level cache.
//
// Work: K(K+1)/2 multiply-adds for each column, or split (K - split). Deterministic: block borders depend on the column
// alone, lanes and pairs are added in a fixed order, and the caller adds the ranges in order.
//
// These were slower: packing the rows first; tiles of five rows; prefetching into the first-level cache (K = 8: 80 % of
// one-stream bandwidth against 92 % into the second); prefetching one block ahead (K = 16: 79 % against 82 %); and
// prefetching for K <= 6.
#include "blocks.h"
#include "kernels.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int kSumLanes = MTLFAST_VECTOR_BYTES / 8;  // doubles a pair's running sum is kept in
constexpr int kStripRows = 4;
constexpr int kOwnPrefetch = 6;                                   // up to so many rows are not prefetched
constexpr int kTileColumns = MTLFAST_VECTOR_BYTES == 64 ? 4 : 3;  // 32 registers hold a 4 x 4 tile, 16 a 4 x 3
template <class T>
constexpr int64_t kAsLoaded = sizeof(T) == 4 ? 16 : kStripRows;  // rows that tiles convert when they load them
constexpr int64_t kWidened = 128;                                // so many columns are converted at a time
constexpr int64_t kExactRun = 32768;  // columns whose exact sums are added one after another: 256 adds of 128 columns

// Which of the rows' products are summed: all pairs, or those of a row before the split with one from the split on.
struct Pairs {
  int64_t num_rows, split;  // split = 0: all

  int64_t count() const { return split > 0 ? split * (num_rows - split) : num_pairs(num_rows); }
  // The place of row i's product with the first row that it meets; the others follow.
  int64_t place(int64_t i) const { return split > 0 ? i * (num_rows - split) : num_pairs(i); }
  int64_t most_rows() const { return split > num_rows - split ? split : num_rows - split; }  // of a side
};

// The part of the rows two blocks ahead that one tile prefetches while it works.
struct Ahead {
  const char* rows[8];
  int count;
};

// Divides the rows of a block among its tiles for prefetching.
template <class T>
class AheadOfTiles {
 public:
  AheadOfTiles(const T* const* rows, const Pairs& pairs, int64_t n, bool in_place)
      : rows_(rows), distance_(2 * n), left_(pairs.num_rows) {
    const auto across = [](int64_t rows) { return (rows + kTileColumns - 1) / kTileColumns; };
    const int64_t K = pairs.num_rows, strips = pairs.split > 0 ? pairs.split : K;
    int64_t tiles = 0;
    for (int64_t first = 0; first < strips; first += kStripRows)
      tiles += pairs.split > 0 ? across(K - pairs.split) : 1 + across(first);
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
  int each_;  // at most 8: a tile meets no more rows, and every row is in a tile
};

MTLFAST_INLINE void add_to(double* sum, F64 v) { store_unaligned(sum, load_unaligned<F64>(sum) + v); }

// sums[i, j] += sum over n columns of a[i] * b[j]; on the diagonal a is b and j <= i.
// S is Simd<T> or Widened<T>. There are Unroll x Sets sets of accumulators, one for each of `Sets` parts of a step, so
// that small tiles keep both multiply-add units busy.
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

// Sums one strip of Rows rows from row `first` on: its triangle, then its tiles with the rows before it; or, with a
// split, its tiles with the rows from the split on.
template <class S, int Rows, class T = typename S::Element>
void strip(const T* const* rows, const Pairs& pairs, int64_t first, int64_t n, double* lanes, AheadOfTiles<T>& ahead) {
  double* sums[Rows];
  if (pairs.split == 0) {
    for (int i = 0; i < Rows; ++i) sums[i] = lanes + (pairs.place(first + i) + first) * kSumLanes;
    triangle<S, Rows>(rows + first, n, sums, ahead.next());
  }
  const T* const* others = rows + pairs.split;
  const int64_t count = pairs.split > 0 ? pairs.num_rows - pairs.split : first;
  for (int64_t j = 0; j < count; j += kTileColumns) {
    for (int i = 0; i < Rows; ++i) sums[i] = lanes + (pairs.place(first + i) + j) * kSumLanes;
    switch (count - j) {
      case 1:
        rectangle<S, Rows, 1>(rows + first, others + j, n, sums, ahead.next());
        break;
      case 2:
        rectangle<S, Rows, 2>(rows + first, others + j, n, sums, ahead.next());
        break;
      case 3:
        rectangle<S, Rows, 3>(rows + first, others + j, n, sums, ahead.next());
        break;
      default:
        rectangle<S, Rows, kTileColumns>(rows + first, others + j, n, sums, ahead.next());
        break;
    }
  }
}

// Sums the pairs over n columns, which S loads.
template <class S, class T = typename S::Element>
void multiply(const T* const* rows, const Pairs& pairs, int64_t n, bool in_place, double* lanes) {
  AheadOfTiles<T> ahead(rows, pairs, n, in_place);
  const int64_t end = pairs.split > 0 ? pairs.split : pairs.num_rows;
  int64_t first = 0;
  for (; first + kStripRows <= end; first += kStripRows) strip<S, kStripRows>(rows, pairs, first, n, lanes, ahead);
  switch (end - first) {
    case 1:
      strip<S, 1>(rows, pairs, first, n, lanes, ahead);
      break;
    case 2:
      strip<S, 2>(rows, pairs, first, n, lanes, ahead);
      break;
    case 3:
      strip<S, 3>(rows, pairs, first, n, lanes, ahead);
      break;
  }
}

// Memory for the addresses of K rows, and after them for kWidened columns of the rows as doubles.
int64_t widened_scratch(int64_t num_tasks) { return round_up(num_tasks * 8, 64) + num_tasks * kWidened * 8; }

// Sums the pairs after converting a few columns at a time to double.
template <class T>
void multiply_widened(const T* const* rows, const Pairs& pairs, int64_t n, bool in_place, char* scratch,
                      double* lanes) {
  using S = Widened<T>;
  const int64_t K = pairs.num_rows;
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
    multiply<Simd<double>>(wide_rows, pairs, columns, false, lanes);
  }
}

// Adds the lanes of each sum to `sums`, and clears the lanes.
void fold_lanes(double* lanes, int64_t count, double* sums) {
  for (int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (int lane = 0; lane < kSumLanes; ++lane) total += lanes[i * kSumLanes + lane];
    sums[i] += total;
  }
  __builtin_memset(lanes, 0, count * kSumLanes * 8);
}

int64_t lanes_bytes(int64_t count) { return round_up(count * kSumLanes * 8, 64); }

// Walks the blocks of a range. use(rows, n, in_place, lanes, scratch) adds to the lanes of `count` sums, which are
// returned in sums[count]. After every `run` columns, or at the end if run is 0, the lanes are added up.
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

void gram(const TaskView& grads, int64_t begin, int64_t end, int64_t split, bool exact, void* scratch, double* sums) {
  const Pairs pairs{grads.num_tasks, split};
  const bool widen = exact && grads.dtype != DType::Float64;
  visit(grads.dtype, [&]<class T>(T) {
    const bool as_loaded = pairs.most_rows() <= kAsLoaded<T>;
    sum_blocks<T>(grads, begin, end, widen ? kExactRun : 0, pairs.count(), static_cast<char*>(scratch), sums,
                  [&](const T* const* rows, int64_t n, bool in_place, double* lanes, char* rest) {
                    if constexpr (sizeof(T) < 8) {
                      if (widen && as_loaded) return multiply<Widened<T>>(rows, pairs, n, in_place, lanes);
                      if (widen) return multiply_widened(rows, pairs, n, in_place, rest, lanes);
                    }
                    multiply<Simd<T>>(rows, pairs, n, in_place, lanes);
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

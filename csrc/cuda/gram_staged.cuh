// G = J J^T for many tasks: rows staged in shared memory, every pair's sum in one thread's registers.
//
// A stage is a span of columns of one tensor for all rows, copied to shared memory by cp.async while the stage before
// it is multiplied. Threads own 4 x 4 tiles of pairs: with m = ceil(K / 4), tile (i, j), j <= i < m, holds the rows i,
// i + m, i + 2m, i + 3m against j, j + m, ..., so that neighbouring threads read neighbouring rows, whose distance in
// shared memory (a stage's row and 16 bytes) puts them on different banks. Where there are fewer tiles than threads,
// `slices` threads share a tile: slice s takes every slices-th group (16 bytes) of columns. Sums are
// float, or double for exact sums and fp64 rows; those of narrower rows take at most kMostAdds adds before they go to
// the thread's doubles.
//
// Between two row blocks (K > 64, or a split) tiles are all (i, j) of rows a against rows b; the same code.
//
// Bytes moved: (rows) * P * itemsize a launch; shared memory: 8 reads of 16 bytes for 16 pairs of a group.
// Deterministic: stages, groups and slices depend on sizes alone. gram_plain.cuh is the slow version that this one is
// tested against.
#pragma once
#include <cuda_pipeline_primitives.h>

#include "sums.cuh"

namespace mtlfast::cuda {

constexpr int kTile = 4;

// What one launch multiplies: rows [0, rows_a) of the table with themselves, or with the rows_b rows behind them.
// Their tasks begin at first_a and first_b of the Gram matrix.
struct RowBlocks {
  int rows_a, rows_b;  // rows_b = 0: with themselves
  int first_a, first_b;
};

// The shape of a stage. Rows: the most that shared memory holds (with two row blocks, half of them each).
template <class T, int Rows>
struct Stage {
  static constexpr int kRowBytes = 16384 / Rows;              // of one row's columns
  static constexpr int kColumns = kRowBytes / sizeof(T);      // divides kChunk
  static constexpr int kStride = kRowBytes + 16;              // from row to row
  static constexpr int kBytes = Rows * kStride;               // one stage; two are held
  static constexpr int kGroups = kColumns / kGroup<T>;        // of a row: a power of two
  static constexpr int kTileSums = kThreads * kTile * kTile;  // doubles, in the same memory at the end
  static_assert(kChunk % kColumns == 0 && 2 * kBytes <= 48 * 1024 && kTileSums * 8 <= 2 * kBytes, "fits");
};

// The tiles of a launch and this thread's place among them.
struct Tiles {
  int classes_a, classes_b, tiles, slices;  // classes: ceil(rows / kTile)
  int tile, slice, i, j;                    // this thread's; slice < 0: it has none; i, j: its first rows of a stage
};

__device__ inline Tiles tiles_of(const RowBlocks& blocks, int most_slices) {
  Tiles t;
  t.classes_a = (blocks.rows_a + kTile - 1) / kTile;
  t.classes_b = blocks.rows_b > 0 ? (blocks.rows_b + kTile - 1) / kTile : t.classes_a;
  t.tiles = blocks.rows_b > 0 ? t.classes_a * t.classes_b : t.classes_a * (t.classes_a + 1) / 2;
  t.slices = 1;
  while (2 * t.slices * t.tiles <= kThreads && 2 * t.slices <= most_slices) t.slices *= 2;
  t.tile = thread() % t.tiles;
  t.slice = thread() < t.tiles * t.slices ? thread() / t.tiles : -1;
  return t;
}

// Tile -> (i, j): row by row of the lower triangle, or of the rectangle.
__device__ inline void place_of(const RowBlocks& blocks, const Tiles& t, int tile, int& i, int& j) {
  if (blocks.rows_b > 0) {
    i = tile / t.classes_b;
    j = tile % t.classes_b;
  } else {
    i = 0;
    while ((i + 1) * (i + 2) / 2 <= tile) ++i;
    j = tile - i * (i + 1) / 2;
  }
}

// Starts the copy of a piece's first n columns, n <= kColumns, into a stage; zeros behind n and in rows that are
// missing. Row r of a stands at stage row r, row r of b at Rows / 2 + r.
template <class T, int Rows>
__device__ inline void copy_stage(const Table& table, const RowBlocks& blocks, const Piece& piece, int n,
                                  unsigned char* stage) {
  using S = Stage<T, Rows>;
  const int groups = (n + kGroup<T> - 1) / kGroup<T>;
  const int padded_a = (blocks.rows_a + kTile - 1) / kTile * kTile;
  const int padded_b = (blocks.rows_b + kTile - 1) / kTile * kTile;
  const int bytes = table.tag(piece.entry) & 31, padded = padded_a + padded_b;
  // Where group `group` of a padded row is, nullptr for zeros, and where it goes.
  const auto source_of = [&](int row, int group) -> const T* {
    const bool in_a = row < padded_a;
    const int r = in_a ? row : row - padded_a;
    if (r >= (in_a ? blocks.rows_a : blocks.rows_b)) return nullptr;
    const T* source = table.row<const T>(piece.entry, in_a ? r : blocks.rows_a + r);
    return source ? source + piece.begin + group * kGroup<T> : nullptr;
  };
  const auto target_of = [&](int row, int group) {
    return stage + ((row < padded_a ? row : Rows / 2 + row - padded_a) * S::kStride + group * 16);
  };
  if constexpr (sizeof(T) < 4) {
    if (bytes < 4) {  // what cp.async cannot copy goes through registers, all rows' loads in flight together
      constexpr int kApart = kThreads / S::kGroups;  // a thread takes one group of every kApart-th row
      constexpr int kParts = Rows / kApart;
      const int first_row = thread() / S::kGroups, group = thread() % S::kGroups;
      const T* from[kParts];
      Group<T> elements[kParts];
      if (group >= groups) return;
#pragma unroll
      for (int i = 0; i < kParts; ++i) from[i] = source_of(first_row + i * kApart, group);
      load_groups(from, n - group * kGroup<T>, bytes, elements);
#pragma unroll
      for (int i = 0; i < kParts; ++i)
        if (first_row + i * kApart < padded) store_words(target_of(first_row + i * kApart, group), elements[i].by16);
      return;
    }
  }
  for (int unit = thread(); unit < padded * S::kGroups; unit += kThreads) {
    const int row = unit / S::kGroups, group = unit % S::kGroups, first = group * kGroup<T>;
    if (group >= groups) continue;
    unsigned char* to = target_of(row, group);
    const T* from = source_of(row, group);
    if (!from) {
      *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
      continue;
    }
    if (n - first >= kGroup<T> && bytes == 16) {
      __pipeline_memcpy_async(to, from, 16);
    } else if (n - first >= kGroup<T> && bytes == 8) {
      for (int i = 0; i < 16; i += 8) __pipeline_memcpy_async(to + i, reinterpret_cast<const char*>(from) + i, 8);
    } else if (n - first >= kGroup<T> && bytes == 4) {
      for (int i = 0; i < 16; i += 4) __pipeline_memcpy_async(to + i, reinterpret_cast<const char*>(from) + i, 4);
    } else {  // a tail
      const T* const one[1] = {from};
      Group<T> elements[1];
      load_groups(one, n - first, sizeof(T), elements);
      store_words(to, elements[0].by16);
    }
  }
}

template <class T, class Sum>
__device__ inline void load_wide(const unsigned char* from, Sum (&wide)[kGroup<T>]) {
  Group<T> group;
  load_words(from, group.by16);
#pragma unroll
  for (int e = 0; e < kGroup<T>; ++e) wide[e] = widen_to<Sum>(group.element[e]);
}

// Multiplies this thread's tile over its groups of a stage of n columns.
template <class T, int Rows, class Sum>
__device__ inline void multiply_stage(const unsigned char* stage, const Tiles& t, int n, Sum (&sums)[kTile][kTile],
                                      double (&run)[kTile][kTile], int& adds) {
  using S = Stage<T, Rows>;
  for (int group = t.slice; group * kGroup<T> < n; group += t.slices) {
    Sum a[kTile][kGroup<T>];
#pragma unroll
    for (int i = 0; i < kTile; ++i) load_wide<T, Sum>(stage + (t.i + i * t.classes_a) * S::kStride + group * 16, a[i]);
#pragma unroll
    for (int j = 0; j < kTile; ++j) {
      Sum b[kGroup<T>];
      load_wide<T, Sum>(stage + (t.j + j * t.classes_b) * S::kStride + group * 16, b);
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int e = 0; e < kGroup<T>; ++e) sums[i][j] += a[i][e] * b[e];
    }
    adds += kGroup<T>;
    if (sizeof(T) < 8 && adds == kMostAdds<Sum>) {
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int j = 0; j < kTile; ++j) {
          run[i][j] += static_cast<double>(sums[i][j]);
          sums[i][j] = 0;
        }
      adds = 0;
    }
  }
}

// One span of columns after another, through this block's chunks.
struct StageWalk {
  Share share;  // what is left of it
  Piece piece;  // what is left of the chunk

  __device__ bool valid() const { return share.chunk < share.end; }
  __device__ void start(const Table& table) {
    if (valid()) piece = piece_of(table, static_cast<int>(share.chunk));
  }
  __device__ void next(const Table& table, int columns) {
    piece.begin += columns;
    piece.n -= columns;
    if (piece.n > 0) return;
    share.chunk += share.step;
    start(table);
  }
};

// Grid: min(blocks for the tiles' sums, chunks), with groups as gram_kernel's; block: kThreads. partials:
// [grid, tiles * 16], tile after tile.
template <class T, int Rows, class Sum>
__global__ void __launch_bounds__(kThreads)
    gram_staged_kernel(const Table __grid_constant__ table, const RowBlocks blocks, const Sums sums) {
  using S = Stage<T, Rows>;
  __shared__ __align__(16) unsigned char stages[2 * S::kBytes];
  Tiles t = tiles_of(blocks, S::kGroups);
  place_of(blocks, t, t.tile, t.i, t.j);
  if (blocks.rows_b > 0) t.j += Rows / 2;
  Sum tile_sums[kTile][kTile] = {};
  double run[kTile][kTile] = {};
  int adds = 0;

  StageWalk walk{share_of(table, sums), {}};
  walk.start(table);
  const auto columns_of = [&] { return walk.piece.n < S::kColumns ? walk.piece.n : S::kColumns; };
  int n = 0, turn = 0;  // columns of the stage to multiply; which of the two it is
  if (walk.valid()) {
    n = columns_of();
    copy_stage<T, Rows>(table, blocks, walk.piece, n, stages);
    walk.next(table, S::kColumns);
  }
  __pipeline_commit();
  while (n > 0) {
    int next_n = 0;
    if (walk.valid()) {
      next_n = columns_of();
      copy_stage<T, Rows>(table, blocks, walk.piece, next_n, stages + (1 - turn) * S::kBytes);
      walk.next(table, S::kColumns);
    }
    __pipeline_commit();
    __pipeline_wait_prior(1);  // all but the copy just begun
    __syncthreads();
    if (t.slice >= 0) multiply_stage<T, Rows, Sum>(stages + turn * S::kBytes, t, n, tile_sums, run, adds);
    __syncthreads();  // before the next copy into the memory just read
    n = next_n;
    turn = 1 - turn;
  }

  double* of_slice = reinterpret_cast<double*>(stages);  // [slices, tiles * 16]
  const int num_sums = t.tiles * kTile * kTile;
  if (t.slice >= 0) {
#pragma unroll
    for (int i = 0; i < kTile; ++i)
#pragma unroll
      for (int j = 0; j < kTile; ++j)
        of_slice[t.slice * num_sums + t.tile * (kTile * kTile) + i * kTile + j] =
            run[i][j] + static_cast<double>(tile_sums[i][j]);
  }
  __syncthreads();
  add_partials(sums, sums.partials + static_cast<long long>(blockIdx.x) * num_sums, num_sums, [&](int i) {
    double sum = 0;
    for (int slice = 0; slice < t.slices; ++slice) sum += of_slice[slice * num_sums + i];
    return sum;
  });
  const GroupBlocks together = blocks_of_result(table, sums);
  if (!is_last_block(sums, together.count, together.entry)) return;
  add_up(sums.partials + static_cast<long long>(together.first) * num_sums, together.count, num_sums,
         [&](int index, double sum) {
           int i, j;
           place_of(blocks, t, index / (kTile * kTile), i, j);
           const int row_a = i + index / kTile % kTile * t.classes_a, row_b = j + index % kTile * t.classes_b;
           if (row_a >= blocks.rows_a || row_b >= (blocks.rows_b > 0 ? blocks.rows_b : blocks.rows_a)) return;
           if (blocks.rows_b == 0 && i == j && row_b > row_a) return;  // a tile on the diagonal has this pair twice
           write_product(table, sums, together, blocks.first_a + row_a, blocks.first_b + row_b, sum);
         });
}

}  // namespace mtlfast::cuda

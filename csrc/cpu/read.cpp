// Reads a range of columns and keeps nothing. The benchmark compares kernels with its speed, which is the memory's.
//
// It reads `streams` rows side by side, 64 bytes of each in turn. A plain sum reads one stream; more than four streams
// were not faster. Bytes moved: K * n * itemsize.
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

constexpr int kVectors = 64 / MTLFAST_VECTOR_BYTES;  // of a cache line

template <int Streams>
U32 read_rows(const char* const* rows, int64_t bytes) {
  U32 sums[Streams] = {};
  for (int64_t at = 0; at + 64 <= bytes; at += 64)
#pragma GCC unroll 4
    for (int s = 0; s < Streams; ++s)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[s] += load_unaligned<U32>(rows[s] + at + v * MTLFAST_VECTOR_BYTES);
  for (int s = 1; s < Streams; ++s) sums[0] += sums[s];
  return sums[0];
}

}  // namespace

uint32_t read(const TaskView& grads, int64_t begin, int64_t end, int64_t streams) {
  const int64_t size = item_size(grads.dtype);
  U32 sum = {};
  for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t n) {
    const char* rows[4];
    int64_t open = 0;
    for (int64_t k = 0; k < grads.num_tasks; ++k) {
      if (const void* row = grads.tensor(t)[k]) rows[open++] = static_cast<const char*>(row) + first * size;
      if (open == 4 && streams == 4) sum += read_rows<4>(rows, n * size), open = 0;
      if (open > 0 && (streams == 1 || k + 1 == grads.num_tasks)) {
        for (int64_t i = 0; i < open; ++i) sum += read_rows<1>(rows + i, n * size);
        open = 0;
      }
    }
  });
  uint32_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

}  // namespace mtlfast::MTLFAST_ISA

// Distributes the tensors of an op over tables, one for each launch. Host code without a CUDA header.
#pragma once
#include "../kernels.h"
#include "table.h"

namespace mtlfast::cuda {

constexpr int64_t kMostChunks = 1 << 30;  // of one table, because chunk numbers are ints

constexpr int capacity(int num_rows) { return kTableWords / (num_rows + 2); }  // entries of a table
constexpr int kMostRows = kTableWords - 2;

inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// The number of chunks of all tensors. A chunk holds columns of one tensor only.
inline int64_t chunks_of(const TaskView& grads) {
  int64_t chunks = 0;
  for (int64_t t = 0; t < grads.num_tensors; ++t) chunks += chunks_of(grads.offsets[t + 1] - grads.offsets[t]);
  return chunks;
}

// The number of blocks for a kernel of `num_sums` sums. It follows from sizes alone, so that results do not depend on
// the GPU. It is large enough to fill a GPU several times over, smaller if the partial sums would need more than half a
// MiB, and at least 256.
inline int blocks_for(int64_t num_sums, int64_t chunks) {
  const int64_t most = 65536 / num_sums, blocks = most < 256 ? 256 : most > 1024 ? 1024 : most;
  return static_cast<int>(chunks < 1 ? 1 : chunks < blocks ? chunks : blocks);
}

// With groups, how many chunks a block takes, so that about `blocks` take them all; 0 without groups.
inline int chunks_each(const TaskView& grads, int64_t blocks) {
  const int64_t each = (chunks_of(grads) + blocks - 1) / blocks;
  return grads.groups ? static_cast<int>(each < 1 ? 1 : each < kMostChunks ? each : kMostChunks) : 0;
}
// The most blocks of one launch: with groups, each group of a table may have a block that is not full.
inline int64_t most_blocks(const TaskView& grads, int64_t num_rows, int64_t blocks) {
  const int64_t entries = capacity(static_cast<int>(num_rows));
  return !grads.groups ? blocks : blocks + (grads.num_tensors < entries ? grads.num_tensors : entries);
}

// For kernels with a sum for each row: launches of at most kSummedRows rows, which all share their partial sums.
constexpr int64_t kSummedRows = 64;
inline int row_blocks(const TaskView& grads, int64_t rows) { return blocks_for(64 * rows, chunks_of(grads)); }
inline int64_t row_partials(const TaskView& grads) {
  const int64_t rows = grads.num_tasks < kSummedRows ? grads.num_tasks : kSummedRows;
  return rows * most_blocks(grads, rows, row_blocks(grads, rows));
}
// Calls use(first, rows) for each launch's rows, until one returns an error text.
template <class Use>
const char* for_each_rows(int64_t num_rows, Use use) {
  const char* error = nullptr;
  for (int64_t first = 0; first < num_rows && !error; first += kSummedRows)
    error = use(first, static_cast<int>(num_rows - first < kSummedRows ? num_rows - first : kSummedRows));
  return error;
}

// Fills tables entry by entry, and calls launch(table, first, last) for each, which returns nullptr or an error text.
// each > 0: chunks are by group (table.h), and a table without entries is not launched.
template <class Launch>
class Packer {
 public:
  Packer(int64_t num_rows, Launch launch, int64_t each = 0) : launch_(launch), each_(each) {
    table_.num_rows = static_cast<int>(num_rows);
    table_.num_entries = table_.num_chunks = table_.continues = 0;
    table_.first_chunk = 0;
    if (num_rows > kMostRows) error_ = "a table has no room for that many tasks";
  }

  // Adds a tensor of numel > 0 elements. row(r): the r-th pointer.
  template <class Row>
  void add(int64_t numel, int tag, Row row) {
    const int64_t chunks = chunks_of(numel);
    if (!error_ && chunks > kMostChunks) error_ = "a tensor has more than 2^42 elements";
    if (error_) return;
    if (table_.num_entries == capacity(table_.num_rows) || begin_of(tag) + chunks > kMostChunks) flush(false);
    table_.num_chunks = static_cast<int>(begin_of(tag));
    if (each_ > 0 && table_.num_entries == 0) table_.continues = tag >> kGroupBit == group_;
    group_ = tag >> kGroupBit;
    unsigned long long* words = table_.words + table_.at(table_.num_entries++);
    words[0] = static_cast<unsigned long long>(numel);
    words[1] = static_cast<unsigned long long>(tag) << 32 | static_cast<unsigned long long>(table_.num_chunks);
    for (int r = 0; r < table_.num_rows; ++r) words[2 + r] = reinterpret_cast<unsigned long long>(row(r));
    table_.num_chunks += static_cast<int>(chunks);
  }

  // Launches the last table, an empty one if nothing was added, and returns the first error.
  const char* finish() {
    flush(true);
    return error_;
  }

 private:
  // The number of the first chunk of an entry that is added.
  int64_t begin_of(int tag) const {
    const bool next_group = each_ > 0 && table_.num_entries > 0 && tag >> kGroupBit != group_;
    return next_group ? (table_.num_chunks + each_ - 1) / each_ * each_ : table_.num_chunks;
  }

  void flush(bool last) {
    if (!error_ && (each_ == 0 || table_.num_entries > 0)) error_ = launch_(table_, first_, last);
    first_ = false;
    table_.first_chunk += table_.num_chunks;
    table_.num_entries = table_.num_chunks = 0;
  }

  Table table_;
  Launch launch_;
  int64_t each_;
  int group_ = -1;  // of the last entry
  bool first_ = true;
  const char* error_ = nullptr;
};

// The widest access that all `count` rows allow. A nullptr allows any.
inline int widest_access(const void* const* rows, int64_t count) {
  unsigned long long address = 0;
  for (int64_t r = 0; r < count; ++r) address |= reinterpret_cast<unsigned long long>(rows[r]);
  return widest_access(address);
}

// A tag of widths and of the group of tensor t.
inline int tag_of(const TaskView& grads, int64_t t, int widths) {
  return widths | static_cast<int>(grads.group(t)) << kGroupBit;
}

// Tables of the rows [first, first + count) of the gradients; each > 0: with their chunks by group.
template <class Launch>
const char* for_each_table(const TaskView& grads, int64_t first, int64_t count, Launch launch, int each = 0) {
  Packer<Launch> packer(count, launch, each);
  for (int64_t t = 0; t < grads.num_tensors; ++t) {
    const void* const* rows = grads.tensor(t) + first;
    const int64_t numel = grads.offsets[t + 1] - grads.offsets[t];
    if (numel > 0) packer.add(numel, tag_of(grads, t, widest_access(rows, count)), [&](int r) { return rows[r]; });
  }
  return packer.finish();
}

}  // namespace mtlfast::cuda

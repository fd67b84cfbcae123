// The memory that one launch works on: a table of tensors, passed by value in the kernel's argument.
//
// Because it is passed by value, nothing is copied to the device, nothing must be kept alive, and a CUDA graph can
// capture the launch. An argument may have 32,764 bytes; more tensors take more launches (pack.h). Every tensor is cut
// into chunks of kChunk columns. A block takes chunks in turn and finds the tensor of each by binary search.
#pragma once
#include "../host_device.h"

namespace mtlfast::cuda {

constexpr int kThreads = 256;      // of every kernel but solve's
constexpr int kChunk = 4096;       // columns
constexpr int kTableWords = 4080;  // 1360 entries of one row, 408 of 8, 226 of 16, 61 of 64
constexpr int kGroupBit = 10;      // of a tag, from which on it is the entry's group, where an op takes groups

struct Table {
  int num_entries;        // tensors
  int num_rows;           // pointers of an entry
  int num_chunks;         // of all entries
  int continues;          // whether the group of entry 0 has entries in an earlier table, where chunks are by group
  long long first_chunk;  // of this table, counted over all launches of the op
  // Entry e begins at word e * (num_rows + 2). Its first word is its number of elements. The low half of its second
  // word is its first chunk, counted in this table, and the high half its tag. Then follow its num_rows pointers.
  unsigned long long words[kTableWords];

  MTLFAST_HD int at(int entry) const { return entry * (num_rows + 2); }
  MTLFAST_HD long long numel(int entry) const { return static_cast<long long>(words[at(entry)]); }
  MTLFAST_HD int chunk_of(int entry) const { return static_cast<int>(words[at(entry) + 1] & 0xffffffffu); }
  MTLFAST_HD int tag(int entry) const { return static_cast<int>(words[at(entry) + 1] >> 32); }
  MTLFAST_HD int group(int entry) const { return tag(entry) >> kGroupBit; }
  template <class T>
  MTLFAST_HD T* row(int entry, int r) const {  // nullptr: zeros
    return reinterpret_cast<T*>(words[at(entry) + 2 + r]);
  }
};
static_assert(sizeof(Table) + 88 <= 32764, "the table and what else a kernel takes fit one argument");

// The columns begin .. begin + n of an entry: one chunk.
struct Piece {
  int entry, n;
  long long begin;
};

MTLFAST_HD inline int entry_of(const Table& table, int chunk) {
  int low = 0, high = table.num_entries;  // chunk_of(low) <= chunk < chunk_of(high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.chunk_of(middle) <= chunk)
      low = middle;
    else
      high = middle;
  }
  return low;
}

MTLFAST_HD inline Piece piece_of(const Table& table, int chunk) {
  const int entry = entry_of(table, chunk);
  const long long begin = static_cast<long long>(chunk - table.chunk_of(entry)) * kChunk;
  const long long left = table.numel(entry) - begin;
  return {entry, static_cast<int>(left < kChunk ? left : kChunk), begin};
}

// The first of a table's chunks that block `block` of `grid` takes; its other chunks follow at a distance of `grid`.
// Chunks are assigned by their number over all launches, however the tables were cut. A run of additions does end with
// its table. So the last bits of a sum depend on where tables were cut, which the number of rows and the sizes of the
// tensors decide.
MTLFAST_HD inline int first_chunk_of(const Table& table, int block, int grid) {
  const int ahead = block - static_cast<int>(table.first_chunk % grid);
  return ahead < 0 ? ahead + grid : ahead;
}

// Where chunks are by group, entries are in the order of their groups, each group begins at a multiple of `each`
// chunks, and block b takes the chunks from b * each on. So a block has chunks of one group only, and some numbers at
// the end of a group stand for no chunk.

// Behind the last chunk of such a block.
MTLFAST_HD inline long long end_of_block(const Table& table, int each, int block) {
  const long long end = static_cast<long long>(block + 1) * each;
  const int last = entry_of(table, static_cast<int>(end - 1 < table.num_chunks ? end - 1 : table.num_chunks - 1));
  const long long own = table.chunk_of(last) + (table.numel(last) + kChunk - 1) / kChunk;
  return end < own ? end : own;
}

// The blocks first .. first + count that have the chunks of a group, and the group's first entry.
struct GroupBlocks {
  int group, entry, first, count;
};

// The first entry of a group, or of the next one that the table has.
MTLFAST_HD inline int first_entry(const Table& table, int group) {
  int low = -1, high = table.num_entries;  // group(low) < group <= group(high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table.group(middle) < group)
      low = middle;
    else
      high = middle;
  }
  return high;
}

MTLFAST_HD inline GroupBlocks blocks_of_group(const Table& table, int each, int block) {
  const int group = table.group(entry_of(table, block * each));
  const int entry = first_entry(table, group), next = first_entry(table, group + 1);
  const int end = next < table.num_entries ? table.chunk_of(next) : table.num_chunks;
  const int first = table.chunk_of(entry) / each;
  return {group, entry, first, (end + each - 1) / each - first};
}

// The widest load, 16 to 1 bytes, that is aligned at `address`, which may be several addresses or-ed together.
MTLFAST_HD inline int widest_access(unsigned long long address) {
  int bytes = 16;
  while (address % bytes != 0) bytes /= 2;
  return bytes;
}

}  // namespace mtlfast::cuda

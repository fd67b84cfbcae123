// The host part of the CUDA launchers with sizes that no machine here holds: chunks, tables, widths. No CUDA, no torch.
#include "cuda/pack.h"

#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

using namespace mtlfast::cuda;
using mtlfast::int64_t;

#define EXPECT(condition)                                                \
  if (!(condition)) {                                                    \
    std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

constexpr int64_t one = 1;

// The tables of rows of the given sizes, with made-up addresses: row r of tensor t at (t + 1) * 2^44 + r * 64.
std::vector<Table> tables_of(const std::vector<int64_t>& sizes, int64_t num_rows, const char** error = nullptr) {
  std::vector<Table> tables;
  std::vector<bool> firsts, lasts;
  const auto launch = [&](const Table& table, bool first, bool last) -> const char* {
    tables.push_back(table);
    firsts.push_back(first);
    lasts.push_back(last);
    return nullptr;
  };
  Packer<decltype(launch)> packer(num_rows, launch);
  for (size_t t = 0; t < sizes.size(); ++t)
    packer.add(sizes[t], static_cast<int>(t % 7),
               [&](int r) { return reinterpret_cast<void*>((t + 1) * (one << 44) + r * 64); });
  const char* said = packer.finish();
  if (error)
    *error = said;
  else
    EXPECT(said == nullptr);
  for (size_t i = 0; i < tables.size(); ++i) {
    EXPECT(firsts[i] == (i == 0));
    EXPECT(lasts[i] == (i + 1 == tables.size()));
  }
  return tables;
}

// Every tensor is whole: its chunks, in order, cover it without gap, and rows and tags are its own.
void check_tables(const std::vector<int64_t>& sizes, int64_t num_rows) {
  size_t t = 0;
  int64_t chunks_before = 0;
  for (const Table& table : tables_of(sizes, num_rows)) {
    EXPECT(table.first_chunk == chunks_before);
    EXPECT(table.num_entries <= capacity(static_cast<int>(num_rows)));
    int64_t chunks = 0;
    for (int entry = 0; entry < table.num_entries; ++entry, ++t) {
      const int64_t numel = sizes[t], own = (numel + kChunk - 1) / kChunk;
      EXPECT(table.numel(entry) == numel);
      EXPECT(table.chunk_of(entry) == chunks);
      EXPECT(table.tag(entry) == static_cast<int>(t % 7));
      for (int r = 0; r < num_rows; ++r)
        EXPECT(table.row<char>(entry, r) == reinterpret_cast<char*>((t + 1) * (one << 44) + r * 64));
      for (int64_t i : {int64_t{0}, own / 3, own / 2, own - 1}) {
        const Piece piece = piece_of(table, static_cast<int>(chunks + i));
        EXPECT(piece.entry == entry);
        EXPECT(piece.begin == i * kChunk);
        EXPECT(piece.n == (i == own - 1 ? numel - i * kChunk : kChunk));
      }
      chunks += own;
    }
    EXPECT(table.num_chunks == chunks);
    chunks_before += chunks;
  }
  EXPECT(t == sizes.size());
}

// Over all tables each chunk goes to the block of its number, whatever the tables' borders.
void check_blocks(const std::vector<int64_t>& sizes, int64_t num_rows, int grid) {
  int64_t before = 0;
  for (const Table& table : tables_of(sizes, num_rows)) {
    std::set<int64_t> taken;
    for (int block = 0; block < grid; ++block)
      for (long long chunk = first_chunk_of(table, block, grid); chunk < table.num_chunks; chunk += grid) {
        EXPECT(chunk >= 0 && (before + chunk) % grid == block);
        EXPECT(taken.insert(chunk).second);
      }
    EXPECT(static_cast<int64_t>(taken.size()) == table.num_chunks);
    before += table.num_chunks;
  }
}

// With chunks by group: over all tables each chunk goes to one block, every block has chunks of one group, and the
// blocks of a group are one after another.
void check_groups(const std::vector<int64_t>& sizes, const std::vector<int>& groups, int64_t num_rows, int each) {
  size_t t = 0;
  int before = -1;
  const auto launch = [&](const Table& table, bool, bool) -> const char* {
    EXPECT(table.num_entries > 0);
    EXPECT(table.continues == (table.group(0) == before));
    before = table.group(table.num_entries - 1);
    std::vector<int64_t> taken(table.num_entries, 0);
    const int grid = (table.num_chunks + each - 1) / each;
    for (int block = 0; block < grid; ++block) {
      const GroupBlocks own = blocks_of_group(table, each, block);
      EXPECT(own.first <= block && block < own.first + own.count && own.first + own.count <= grid);
      EXPECT(table.group(own.entry) == own.group && (own.entry == 0 || table.group(own.entry - 1) < own.group));
      EXPECT(blocks_of_group(table, each, own.first).first == own.first);
      const long long end = end_of_block(table, each, block);
      EXPECT(end > static_cast<long long>(block) * each);  // no block has nothing to do
      for (long long chunk = static_cast<long long>(block) * each; chunk < end; ++chunk) {
        const Piece piece = piece_of(table, static_cast<int>(chunk));
        EXPECT(table.group(piece.entry) == own.group && piece.n > 0);
        EXPECT(piece.begin == kChunk * taken[piece.entry]++);
      }
    }
    for (int entry = 0; entry < table.num_entries; ++entry, ++t) {
      EXPECT(table.numel(entry) == sizes[t] && table.group(entry) == groups[t] && (table.tag(entry) & 31) == 16);
      EXPECT(taken[entry] == chunks_of(sizes[t]));
    }
    return nullptr;
  };
  Packer<decltype(launch)> packer(num_rows, launch, each);
  for (size_t i = 0; i < sizes.size(); ++i)
    packer.add(sizes[i], 16 | groups[i] << kGroupBit, [](int) { return nullptr; });
  EXPECT(packer.finish() == nullptr);
  EXPECT(t == sizes.size());
}

int main() {
  EXPECT(chunks_of((one << 31) + 1) == (one << 19) + 1);
  EXPECT(chunks_of((one << 40) + 5) == (one << 28) + 1);
  EXPECT(chunks_of(1) == 1 && chunks_of(kChunk) == 1 && chunks_of(kChunk + 1) == 2);

  const std::vector<int64_t> large = {1, one << 40, 3, (one << 31) + 7, kChunk, (one << 41) - 1, kChunk + 1, 5};
  for (int64_t rows : {1, 2, 8, 17, 64, 128}) {
    check_tables(large, rows);
    check_tables({}, rows);
    check_tables(std::vector<int64_t>(3000, 4097), rows);
  }
  check_tables({one << 42, 1, one << 42, one << 41}, 2);  // more chunks than one table may have
  EXPECT(tables_of({one << 42, one << 42}, 1).size() == 2);
  const char* error = nullptr;
  tables_of({(one << 42) + 1}, 1, &error);
  EXPECT(error != nullptr);
  tables_of({1}, kMostRows + 1, &error);
  EXPECT(error != nullptr);

  EXPECT(tables_of({}, 8).size() == 1);  // an op of nothing still writes its result
  EXPECT(tables_of(std::vector<int64_t>(capacity(1), 1), 1).size() == 1);
  EXPECT(tables_of(std::vector<int64_t>(capacity(1) + 1, 1), 1).size() == 2);
  EXPECT(capacity(8) >= 400);  // a surgery of 400 tensors at K = 8 is one launch an op
  for (int rows = 1; rows <= kMostRows; ++rows)
    EXPECT(capacity(rows) * (rows + 2) <= kTableWords && capacity(rows) > 0);

  for (int grid : {1, 2, 7, 256, 1024}) {
    check_blocks(std::vector<int64_t>(1500, 9000), 2, grid);
    check_blocks({1, 1, 1, 40000, 1}, 64, grid);
  }

  for (int each : {1, 2, 7, 100}) {
    const std::vector<int64_t> mixed = {1, 40000, 5, 4096, 4097, 1, 90000, 3};
    check_groups({}, {}, 2, each);
    check_groups(mixed, {0, 1, 2, 3, 4, 5, 6, 7}, 2, each);
    check_groups(mixed, {0, 0, 0, 2, 2, 9, 9, (1 << 21) - 1}, 64, each);
    check_groups(std::vector<int64_t>(3000, 9000), std::vector<int>(3000, 4), 2, each);  // one group, several tables
    std::vector<int> pairs(3001);
    for (int i = 0; i < 3001; ++i) pairs[i] = i / 2;
    check_groups(std::vector<int64_t>(3001, 9000), pairs, 1, each);
  }

  EXPECT(widest_access(0) == 16 && widest_access(32) == 16 && widest_access(8) == 8 && widest_access(24) == 8);
  EXPECT(widest_access(20) == 4 && widest_access(6) == 2 && widest_access(7) == 1);
  const void* rows[] = {nullptr, reinterpret_cast<void*>(64), reinterpret_cast<void*>(36)};
  EXPECT(widest_access(rows, 1) == 16 && widest_access(rows, 2) == 16 && widest_access(rows, 3) == 4);

  // Blocks depend on sizes alone, keep partial sums bounded and never leave a GPU empty.
  EXPECT(blocks_for(36, 1 << 20) == 1024 && blocks_for(136, 1 << 20) == 481 && blocks_for(2176, 1 << 20) == 256);
  EXPECT(blocks_for(36, 0) == 1 && blocks_for(36, 3) == 3 && blocks_for(36, one << 40) == 1024);

  // Views whose offsets lie beyond 2^31 and 2^40.
  const int64_t offsets[] = {0, one << 40, one << 40, (one << 40) + (one << 32) + 1};
  const void* const data[] = {reinterpret_cast<void*>(16), nullptr, nullptr, nullptr, reinterpret_cast<void*>(32),
                              reinterpret_cast<void*>(34)};
  mtlfast::TaskView view{2, 3, data, offsets, mtlfast::DType::BFloat16};
  EXPECT(chunks_of(view) == (one << 28) + (one << 20) + 1);
  EXPECT(row_blocks(view, 1) == 1024 && row_blocks(view, 64) == 256 && row_partials(view) == 2 * 512);
  std::vector<std::pair<int64_t, int>> launches;
  for_each_rows(130, [&](int64_t first, int rows) -> const char* {
    launches.emplace_back(first, rows);
    return nullptr;
  });
  EXPECT((launches == std::vector<std::pair<int64_t, int>>{{0, 64}, {64, 64}, {128, 2}}));
  EXPECT(for_each_rows(130, [](int64_t first, int) { return first == 64 ? "failed" : nullptr; }) != nullptr);
  int tables = 0;
  for_each_table(view, 0, 2, [&](const Table& table, bool, bool) -> const char* {
    ++tables;
    EXPECT(table.num_entries == 2);  // the empty tensor takes no place
    EXPECT(table.tag(0) == 16 && table.tag(1) == 2);
    EXPECT(table.row<void>(0, 1) == nullptr && table.row<void>(1, 0) == data[4]);
    return nullptr;
  });
  EXPECT(tables == 1);

  // Without groups a block has no fixed number of chunks. With them it has enough that about as many blocks take all.
  EXPECT(chunks_each(view, 1024) == 0 && most_blocks(view, 2, 1024) == 1024);
  const int64_t groups[] = {0, 1, 1};
  view.groups = groups;
  EXPECT(chunks_each(view, 1024) == (1 << 18) + 1024 + 1 && most_blocks(view, 2, 1024) == 1027);
  EXPECT(tag_of(view, 2, 16) == 16 + (1 << kGroupBit));
  std::puts("ok");
}

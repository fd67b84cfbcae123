// cp.async: the target is overwritten with noise at once, and gets its bytes at the wait.
#pragma once
#include "../cuda_emulator.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emulator::fail("copies a number of bytes that cp.async does not");
  if (reinterpret_cast<uintptr_t>(to) % bytes != 0 || reinterpret_cast<uintptr_t>(from) % bytes != 0)
    emulator::fail("copies asynchronously from or to a misaligned address");
  std::memset(to, 0xff, bytes);
  emulator::self().copies.back().push_back({to, from, bytes});
}
inline void __pipeline_commit() { emulator::self().copies.emplace_back(); }
inline void __pipeline_wait_prior(size_t prior) {
  auto& copies = emulator::self().copies;
  for (size_t commit = 0; commit + 1 + prior < copies.size(); ++commit) {
    for (const emulator::Copy& copy : copies[commit]) std::memcpy(copy.to, copy.from, copy.bytes);
    copies[commit].clear();
  }
}

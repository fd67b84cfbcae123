// How many threads an op may use.
#pragma once
#include <ATen/Parallel.h>
#include <pthread.h>

#include <cstdint>

namespace mtlfast {

// Whether fork made this process. It copies the state of OpenMP but none of its threads, so that a child which goes on
// with the team of its parent waits for them forever.
inline bool forked = false;
inline const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

inline int64_t num_threads() { return forked ? 1 : at::get_num_threads(); }

}  // namespace mtlfast

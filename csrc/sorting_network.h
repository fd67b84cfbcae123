// Batcher's odd-even merge sort: which pairs of N numbers are compared and exchanged, one after another, to sort them.
// It is a constant of the compiler, so that the N numbers can stay in registers.
#pragma once
#include "host_device.h"

namespace mtlfast {

// The comparisons of N numbers, in order: number low[i] is to be the smaller of it and number high[i].
template <int N>
struct SortingNetwork {
  int count = 0;
  short low[N * 10] = {}, high[N * 10] = {};  // N <= 64 takes at most 543

  constexpr SortingNetwork() {
    for (int run = 1; run < N; run *= 2)  // sorted runs become runs of twice the length
      for (int apart = run; apart > 0; apart /= 2)
        for (int first = apart % run; first + apart < N; first += 2 * apart)
          for (int i = first; i < first + apart && i + apart < N; ++i)
            if (i / (2 * run) == (i + apart) / (2 * run)) {
              low[count] = static_cast<short>(i);
              high[count++] = static_cast<short>(i + apart);
            }
  }
};
template <int N>
constexpr SortingNetwork<N> kSortingNetwork;

}  // namespace mtlfast

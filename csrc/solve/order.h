// The order in which one gradient meets the others: PCGrad's and GradVac's.
#pragma once
#include "team.h"

namespace mtlfast::solvers {

// Ascending keys, ties by index; ascending indices without keys.
struct Order {
  const double* keys;  // [K], or nullptr
  int K, self;

  // Of the gradient `self` of a problem whose first input, if any, is keys [K, K].
  MTLFAST_HD static Order of(const Problem& p, int self) {
    return {p.num_inputs > 0 ? p.inputs[0] + self * p.num_tasks : nullptr, p.num_tasks, self};
  }

  // The task that comes after j, or -1; j = -1 asks for the first. Keys that are not numbers come never.
  MTLFAST_HD int next(int j) const {
    if (!keys) {
      j += j + 1 == self ? 2 : 1;
      return j < K ? j : -1;
    }
    int best = -1;
    for (int m = 0; m < K; ++m) {
      if (m == self) continue;
      const bool after = j < 0 || keys[m] > keys[j] || (keys[m] == keys[j] && m > j);
      if (after && (best < 0 || keys[m] < keys[best])) best = m;
    }
    return best;
  }
};

}  // namespace mtlfast::solvers

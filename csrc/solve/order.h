// The order in which one gradient meets the others: PCGrad's and GradVac's.
#pragma once
#include "team.h"

namespace mtlfast::solvers {

// Ascending keys, ties by index; ascending indices without keys.
struct Order {
  const double* keys;  // [K], or nullptr
  int K, left_out;     // the task that never comes, or -1

  // Of the gradient `self` of a problem whose first input, if any, is keys [K, K]; `itself`: does it meet itself too?
  MTLFAST_HD static Order of(const Problem& p, int self, bool itself = false) {
    return {p.num_inputs > 0 ? p.inputs[0] + self * p.num_tasks : nullptr, p.num_tasks, itself ? -1 : self};
  }

  // The task that comes after j, or -1; j = -1 asks for the first. Keys that are not numbers come never.
  MTLFAST_HD int next(int j) const {
    if (!keys) {
      j += j + 1 == left_out ? 2 : 1;
      return j < K ? j : -1;
    }
    int best = -1;
    for (int m = 0; m < K; ++m) {
      if (m == left_out) continue;
      const bool after = j < 0 || keys[m] > keys[j] || (keys[m] == keys[j] && m > j);
      if (after && (best < 0 || keys[m] < keys[best])) best = m;
    }
    return best;
  }
};

}  // namespace mtlfast::solvers

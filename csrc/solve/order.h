// The order in which one gradient meets the others: PCGrad's and GradVac's.
#pragma once
#include "algebra.h"

namespace mtlfast::solvers {

// Ascending keys, ties by index; ascending indices without keys.
struct Order {
  const double* keys;  // [K], or nullptr
  int K, left_out;     // the task that never comes, or -1

  // Of the gradient `self` by keys [K, K], or nullptr; `itself`: does it meet itself too?
  MTLFAST_HD static Order of(const double* keys, int K, int self, bool itself = false) {
    return {keys ? keys + self * K : nullptr, K, itself ? -1 : self};
  }

  // The task that comes after j, or -1; j = -1 asks for the first. Keys that are not numbers come never.
  MTLFAST_HD int next(int j) const {
    if (!keys) {
      j += j + 1 == left_out ? 2 : 1;
      return j < K ? j : -1;
    }
    // Chosen by minima, without branches: random keys make a processor guess those wrong.
    const double last = j < 0 ? -HUGE_VAL : keys[j];
    double least = HUGE_VAL;
    int best = -1;
    for (int m = 0; m < K; ++m) {
      const double key = m == left_out ? HUGE_VAL : keys[m];
      const double seen = (key > last) | ((key == last) & (m > j)) ? key : HUGE_VAL;
      best = seen < least ? m : best;
      least = seen < least ? seen : least;
    }
    return best;
  }
};

}  // namespace mtlfast::solvers

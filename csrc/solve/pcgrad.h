// PCGrad (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, Algorithm 1) on the Gram matrix.
//
// Each gradient, written c J, starts at c = e_i and meets the other tasks in a random order. Where (G c)_j < 0 it loses
// its component along g_j:  c_j -= (G c)_j / G_jj.  The update is the sum of the K projected gradients.
// Work: K^2 per gradient. The order comes as keys: task i meets the others by ascending key[i, j], ties by index.
#pragma once
#include "team.h"

namespace mtlfast::solvers {

// C [K, K]: projected gradient i is sum_k C[i, k] g_k. Worker r takes gradients r, r + size, ...
// inputs: keys [K, K], or none for ascending order.
struct PCGradCoefficients {
  static constexpr const char* name = "pcgrad_coefficients";
  static constexpr bool square = true;
  static int64_t scratch_size(int64_t) { return 0; }

  // The task that follows (key, j) in order of (key, index), or -1. `j` = -1 asks for the first.
  MTLFAST_HD static int64_t next(const double* keys, int64_t K, int64_t self, int64_t j) {
    int64_t best = -1;
    for (int64_t m = 0; m < K; ++m) {
      if (m == self) continue;
      const bool after = j < 0 || keys[m] > keys[j] || (keys[m] == keys[j] && m > j);
      if (after && (best < 0 || keys[m] < keys[best])) best = m;
    }
    return best;
  }

  template <class Team>
  MTLFAST_HD static void project(Team team, const Problem& p, double* coefficients) {
    const int64_t K = p.num_tasks;
    for (int64_t i = team.rank; i < K; i += team.size) {
      double* c = coefficients + i * K;
      for (int64_t k = 0; k < K; ++k) c[k] = k == i;
      const double* keys = p.num_inputs > 0 ? p.inputs[0] + i * K : nullptr;
      int64_t j = -1;
      for (int64_t met = 0; met + 1 < K; ++met) {
        if (keys)
          j = next(keys, K, i, j);
        else
          j += j + 1 == i ? 2 : 1;
        if (j < 0) break;  // keys that are not numbers
        double dot = 0;
        for (int64_t k = 0; k < K; ++k) dot += p.gram[j * K + k] * c[k];
        if (dot < 0) c[j] -= dot / p.gram[j * K + j];
      }
    }
    team.sync();
  }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    project(team, p, p.out);
  }
};

// w [K] = column sums of C, divided by K where params[0] (mean) is set.
struct PCGrad {
  static constexpr const char* name = "pcgrad";
  static constexpr bool square = false;
  static int64_t scratch_size(int64_t K) { return K * K; }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int64_t K = p.num_tasks;
    PCGradCoefficients::project(team, p, p.scratch);
    for (int64_t k = team.rank; k < K; k += team.size) {
      double sum = 0;
      for (int64_t i = 0; i < K; ++i) sum += p.scratch[i * K + k];
      p.out[k] = p.params[0] != 0 ? sum / static_cast<double>(K) : sum;
    }
    team.sync();
  }
};

}  // namespace mtlfast::solvers

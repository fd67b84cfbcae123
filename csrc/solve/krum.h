// Krum and Multi-Krum (Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017): the mean of those
// gradients that lie closest to their K - f - 2 nearest others. As TorchJD it adds distances; the paper adds squares.
#pragma once
#include "algebra.h"

namespace mtlfast::solvers {

// n_byzantine: f. Worker r takes gradients r, r + size, ...; ties go to the lower index.
struct Krum : Method {
  static constexpr const char* name = "krum";
  MTLFAST_NAMES(Param, n_byzantine, n_selected);
  static int64_t scratch_size(int K) { return K * K + K; }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks, f = static_cast<int>(p.params[Param::n_byzantine]), nearest = f < 0 ? 0 : K - f - 2;
    const double selected = p.params[Param::n_selected];
    double* scores = p.scratch + K * K;
    for (int i = team.rank; i < K; i += team.size) {
      double* distances = p.scratch + i * K;  // to the others, ascending, behind its own
      for (int j = 0; j < K; ++j)
        distances[j] = std::sqrt(larger(p.gram[i * K + i] + p.gram[j * K + j] - 2 * p.gram[i * K + j], 0));
      distances[i] = -1;
      for (int j = 1; j < K; ++j) {
        const double distance = distances[j];
        int at = j;
        for (; at > 0 && distances[at - 1] > distance; --at) distances[at] = distances[at - 1];
        distances[at] = distance;
      }
      scores[i] = 0;
      for (int n = 1; n <= nearest; ++n) scores[i] += distances[n];
    }
    team.sync();
    for (int i = team.rank; i < K; i += team.size) {
      int better = 0;
      for (int j = 0; j < K; ++j) better += scores[j] < scores[i] || (scores[j] == scores[i] && j < i);
      p.out[i] = static_cast<double>(better) < selected ? 1 / selected : 0;
    }
    team.sync();
  }
};

}  // namespace mtlfast::solvers

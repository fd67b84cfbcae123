// SDMGrad (Xiao et al., "Direction-oriented Multi-objective Learning", NeurIPS 2023): a few steps of projected gradient
// descent with momentum on the weights, w = P(w - lr v), v = momentum v + A (w + lambda u), where A = J_1 J_2^T comes
// from two independent batches and is divided by the mean norm's square. Update: (w + lambda u) / (1 + lambda).
#pragma once
#include "modo.h"

namespace mtlfast::solvers {

// preferences: u [K], 1 / K each without them. gram: A. state: w [n].
struct SDMGrad : Method {
  static constexpr const char* name = "sdmgrad";
  MTLFAST_NAMES(Param, lr, momentum, n_iter, lambda_);
  MTLFAST_NAMES(Input, preferences);
  static int64_t state_size(int known) { return known; }
  static int64_t scratch_size(int K) { return 4 * K; }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    const double lr = p.params[Param::lr], momentum = p.params[Param::momentum], lambda = p.params[Param::lambda_];
    double *w = p.scratch, *v = w + K, *mixed = v + K, *gradient = mixed + K;
    double norm = 0;
    for (int k = 0; k < K; ++k) norm += std::sqrt(larger(p.gram[k * K + k], 0)) / static_cast<double>(K);
    const double scale = norm > 0 ? 1 / (norm * norm) : 0;
    load_weights(team, p, w);
    for (int k = team.rank; k < K; k += team.size) v[k] = 0;
    for (int turn = 0; turn < static_cast<int>(p.params[Param::n_iter]); ++turn) {
      for (int k = team.rank; k < K; k += team.size) mixed[k] = w[k] + lambda * p.preference(Input::preferences, k);
      team.sync();
      multiply(team, K, p.gram, mixed, gradient);
      team.sync();
      for (int k = team.rank; k < K; k += team.size) {
        v[k] = momentum * v[k] + scale * gradient[k];
        w[k] -= lr * v[k];
      }
      team.sync();
      project_onto_simplex(team, K, w, w);
    }
    for (int k = team.rank; k < K; k += team.size)
      p.out[k] = (w[k] + lambda * p.preference(Input::preferences, k)) / (1 + lambda);
    keep_weights(team, p, w);
  }
};

}  // namespace mtlfast::solvers

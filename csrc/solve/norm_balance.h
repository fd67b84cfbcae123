// Norm balancing: weights that depend on the lengths d_k of the gradients alone, the roots of G's diagonal. A zero
// gradient gets weight 0.
#pragma once
#include "norms.h"

namespace mtlfast::solvers {

struct OfNorms : Method {
  static int64_t scratch_size(int K) { return K; }
};

// t / d_k: every gradient gets the length t. target: which TypicalNorm t is. task: whose.
struct NormBalance : OfNorms {
  static constexpr const char* name = "norm_balance";
  MTLFAST_NAMES(Param, target, task);

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    double* d = p.scratch;
    find_norms(team, p, d);
    const double t = typical_norm(static_cast<int>(p.params[Param::target]),
                                  p.place(static_cast<int>(p.params[Param::task])), d, p.num_tasks);
    for (int k = team.rank; k < p.num_tasks; k += team.size) p.out[k] = d[k] > 0 ? t / d[k] : 0;
    team.sync();
  }
};

// min(1, t / d_k): no gradient is longer than t. max_norm: t, or -1 for the mean norm. loss_scale: [1], what t is
// multiplied by, 1 without it.
struct ClipNorm : OfNorms {
  static constexpr const char* name = "clip_norm";
  MTLFAST_NAMES(Param, max_norm);
  MTLFAST_NAMES(Input, loss_scale);
  static int input_size(int, int) { return 1; }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    double* d = p.scratch;
    find_norms(team, p, d);
    const double most = p.params[Param::max_norm];
    const double t = most < 0 ? typical_norm(kMean, 0, d, p.num_tasks) : most * p.input_or(Input::loss_scale, 0, 1);
    for (int k = team.rank; k < p.num_tasks; k += team.size) p.out[k] = d[k] > 0 ? (t < d[k] ? t / d[k] : 1) : 0;
    team.sync();
  }
};

// Of two tasks, each scaled by the other's norm over its own; a task alone keeps its gradient.
struct CrossNorm : OfNorms {
  static constexpr const char* name = "cross_norm";

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    double* d = p.scratch;
    find_norms(team, p, d);
    for (int k = team.rank; k < p.num_tasks; k += team.size)
      p.out[k] = d[k] > 0 ? (p.num_tasks == 2 ? d[1 - k] / d[k] : 1) : 0;
    team.sync();
  }
};

// (1 / d_k) / sum_j (1 / d_j).
struct InverseNorm : OfNorms {
  static constexpr const char* name = "inverse_norm";

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    double* d = p.scratch;
    find_norms(team, p, d);
    for (int k = team.rank; k < p.num_tasks; k += team.size) {
      double sum = 0;  // of d_k / d_j: 1 / d_j alone could overflow
      for (int j = 0; j < p.num_tasks; ++j) sum += d[j] > 0 ? d[k] / d[j] : 0;
      p.out[k] = d[k] > 0 ? 1 / sum : 0;
    }
    team.sync();
  }
};

}  // namespace mtlfast::solvers

// PCD (priority-constrained descent, arXiv 2606.29521, TMLR 2026): follow the first task's gradient as closely as the
// others' progress allows.
//
// With s_i = 1 / sqrt(v_i), v_i the running mean of |g_i|^2, and N_ij = s_i s_j G_ij:  min 1/2 |d - s_0 g_0|^2 over the
// d with s_j g_j d >= tau_j N_jj for j >= 1. Its dual, d = s_0 g_0 + sum_j m_j s_j g_j, is a quadratic program over
// m >= 0. The update is d at the length of g_0; g_0 itself where no d satisfies all; zero where g_0 or d is.
#pragma once
#include "nonnegative_qp.h"

namespace mtlfast::solvers {

// eps: of the mean v, added to each. shares: [K], tau of each task; `tau` for all without them. state: [n + 1, 2]:
// a Counter each; then of each task v and its number of steps.
struct PCD : Method {
  static constexpr const char* name = "pcd";
  MTLFAST_NAMES(Param, beta, eps, tau, rtol);
  MTLFAST_NAMES(Input, shares);
  static int64_t state_size(int known) { return 2 * (known + 1); }
  static constexpr double kFeasible = 1e-9;  // or rtol, of the largest N_jj: a violation that counts as none
  static int64_t scratch_size(int K) { return K * K + 4 * K + NonnegativeQP::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks, others = K - 1;
    double *N = p.scratch, *scale = N + K * K, *w = scale + K, *c = w + K, *products = c + K, *rest = products + K;
    update_scales(team, p, scale);
    // N of the others, with each other; the first task's stand in c and are computed where they are needed.
    for (int j = team.rank; j < others; j += team.size) {
      for (int l = 0; l < others; ++l) N[j * others + l] = normalised(p, scale, j + 1, l + 1);
      const double tau = p.input_or(Input::shares, j + 1, p.params[Param::tau]);
      c[j] = tau * normalised(p, scale, j + 1, j + 1) - normalised(p, scale, j + 1, 0);
    }
    team.sync();
    double* m = w + 1;
    const bool solved = NonnegativeQP{others, N, c, m, rest}.solve(team);
    multiply(team, others, N, m, products);
    team.sync();
    double largest = 0;
    bool feasible = true, exactly = true;  // exactly: but for the rounding of these sums themselves
    for (int j = 0; j < others; ++j) largest = larger(largest, N[j * others + j]);
    for (int j = 0; j < others; ++j) {
      const double excess = products[j] - c[j];
      feasible = feasible && excess >= -larger(kFeasible, p.params[Param::rtol]) * largest;
      exactly = exactly && excess >= -kFeasible * largest;
    }
    team.sync();
    for (int k = team.rank; k < K; k += team.size)
      if (k == 0 || !feasible) w[k] = k == 0;
    p.tally(team, kUnconverged, !solved);
    team.sync();
    double squared = 0, magnitude = 0;  // |d|^2, and what its rounding error is relative to
    for (int i = 0; i < K; ++i) {
      for (int j = 0; j < K; ++j) squared += w[i] * w[j] * normalised(p, scale, i, j);
      magnitude += std::fabs(w[i]) * std::sqrt(normalised(p, scale, i, i));
    }
    const bool leads = p.gram[0] > 0, cancels = !(squared > p.params[Param::rtol] * magnitude * magnitude);
    const bool zero = cancels || !leads;
    p.tally(team, kByNoise, leads && (cancels || feasible != exactly));
    const double length = zero ? 0 : std::sqrt(p.gram[0] / squared);
    for (int k = team.rank; k < K; k += team.size) p.out[k] = zero ? 0 : length * w[k] * scale[k];
    team.sync();
  }

 private:
  MTLFAST_HD static double normalised(const Problem& p, const double* scale, int i, int j) {
    return p.gram[i * p.num_tasks + j] * (scale[i] * scale[j]);
  }

  // One step of each present task's running mean, without its bias towards zero.
  template <class Team>
  MTLFAST_HD static void update_scales(Team team, const Problem& p, double* scale) {
    const int K = p.num_tasks;
    const double beta = p.params[Param::beta];
    for (int k = team.rank; k < K; k += team.size) {
      double* of_task = p.state + 2 * (1 + p.task(k));
      of_task[0] = beta * of_task[0] + (1 - beta) * p.gram[k * K + k];
      of_task[1] += 1;
      scale[k] = of_task[0] / (1 - std::pow(beta, of_task[1]));
    }
    team.sync();
    double mean = 0;
    for (int k = 0; k < K; ++k) mean += scale[k] / static_cast<double>(K);
    team.sync();
    for (int k = team.rank; k < K; k += team.size) {
      const double v = scale[k] + p.params[Param::eps] * mean;
      scale[k] = v > 0 ? 1 / std::sqrt(v) : 0;
    }
    team.sync();
  }
};

}  // namespace mtlfast::solvers

// CAGrad (Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, Algorithm 1).
//
// min over the simplex of g_w^T g_0 + s |g_w|, with g_w = w J, the mean gradient g_0 and s = c |g_0|. Since
// s |g_w| = min over r > 0 of s (|g_w|^2 / r + r) / 2, the minimiser is that of |g_w + (r / s) g_0|^2 for the one
// r = |g_w|: a shortest vector among the shifted gradients g_i + h g_0, with h = r / s found by a bracketed secant
// method on |g_w(h)| - s h, which falls through zero once. Update: g_0 + (s / |g_w|) g_w, rescaled. A user's
// preferences u make u J of g_0.
//
// Where g_w is zero at the minimum, every direction of the ball with which no task loses is as good: the update is the
// one nearest to g_0, its projection onto the dual cone of the gradients.
//
// Clipped (Chen et al., "Reward-free Alignment for Conflicting Objectives", ICML 2026): no w_i is larger than u_i, so
// that g_w is that of min(w, u), and the update is g_0 alone where that is zero.
#pragma once
#include "dual_cone.h"
#include "simplex.h"

namespace mtlfast::solvers {

// A root of a falling function between two points, by regula falsi in the Illinois variant.
struct Bracket {
  double low, high, at_low, at_high;  // the function is positive at low, not at high
  int side;                           // which end moved last

  MTLFAST_HD void move(double at, double value) {
    if (value > 0) {
      if (side == 1) at_high /= 2;
      low = at, at_low = value, side = 1;
    } else {
      if (side == -1) at_low /= 2;
      high = at, at_high = value, side = -1;
    }
  }
  MTLFAST_HD double next() const { return (low * at_high - high * at_low) / (at_high - at_low); }
};

// rescale: 0 none, 1 over 1 + c^2, 2 over 1 + c. norm_eps: TorchJD's, 0 for none: up to norm_eps * sqrt(trace G)
// the point counts as Pareto-stationary and the weights are zero. rtol: a |g_w| whose square is at most that part of
// (sum_i w_i |g_i|)^2 is rounding. clip: are the weights clipped? preferences: [K], at least 0, 1 / K each without
// them. state: [2], a Counter each.
struct CAGrad : Method {
  static constexpr const char* name = "cagrad";
  MTLFAST_NAMES(Param, c, rescale, norm_eps, rtol, clip);
  MTLFAST_NAMES(Input, preferences);
  static int64_t scratch_size(int K) { return 2 + 4 * K + K * K + MinNorm::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    double *constants = p.scratch, *w = constants + 2, *with_mean = w + K, *products = with_mean + K;
    double *lengths = products + K, *shifted = lengths + K;
    const double* u = p.inputs[Input::preferences];
    for (int i = team.rank; i < K; i += team.size)  // g_i g_0
      with_mean[i] = u ? dot(p.gram + i * K, u, K) : sum_of(p.gram + i * K, K) / K;
    team.sync();
    if (team.rank == 0) {
      constants[0] = larger(u ? dot(with_mean, u, K) : sum_of(with_mean, K) / K, 0);  // |g_0|^2
      constants[1] = p.params[Param::c] * std::sqrt(constants[0]);                    // s
    }
    team.sync();

    // h is searched for between its largest value, where |g_w| is the longest that there is, and what rounding makes of
    // zero: where zero lies among the combinations, h = 0 is a root as well, and not the one. Rounding is relative to
    // the gradients that the shortest combination is made of, so that a short gradient is not taken for it.
    const double longest = std::sqrt(trace(p.gram, K)), highest = constants[1] > 0 ? longest / constants[1] : 0;
    const double rounding = larger(1e-6, std::sqrt(p.params[Param::rtol]));
    Bracket bracket{0, 0, 0, 0, 0};
    double h = highest, norm = 0;
    bool solved = true, found = false, zero = false;  // zero: |g_w| is as good as zero at the minimum
    for (int turn = 0; turn < 100 && !found; ++turn) {
      for (int i = team.rank; i < K; i += team.size)
        for (int j = 0; j < K; ++j)
          shifted[i * K + j] = p.gram[i * K + j] + h * (with_mean[i] + with_mean[j]) + h * h * constants[0];
      team.sync();
      solved = MinNorm{K, shifted, shifted + K * K}.solve(team, w, turn > 0) && solved;
      multiply(team, K, p.gram, w, products);
      team.sync();
      norm = std::sqrt(larger(dot(w, products, K), 0));
      const double value = norm - constants[1] * h;
      if (turn == 0) {
        bracket.high = h;
        bracket.at_high = value;
        found = !(constants[1] > 0) || value >= 0;
        h = 0;
        continue;
      }
      if (turn == 1) {
        const double terms = sum_of_lengths(p, w);
        h = rounding * (terms > 0 ? terms : longest) / constants[1];
        continue;
      }
      if (turn == 2) {
        bracket.low = h;
        bracket.at_low = value;
        found = zero = value <= 0;
      } else {
        found = std::fabs(value) <= 1e-13 * norm || bracket.high - bracket.low <= 1e-15 * bracket.high;
        bracket.move(h, value);
      }
      h = bracket.next();
    }
    const double c = p.params[Param::c], s = constants[1], cut = p.params[Param::norm_eps];
    const int mode = static_cast<int>(p.params[Param::rescale]);
    const double rescale = mode == 1 ? 1 / (1 + c * c) : mode == 2 ? 1 / (1 + c) : 1;
    const auto preference = [&](int k) { return p.preference(Input::preferences, k); };
    bool cancels = false;  // is the clipped g_w as good as zero?
    if (s > 0 && cut > 0 && norm <= cut * longest) {
      for (int k = team.rank; k < K; k += team.size) p.out[k] = 0;
    } else if (s > 0 && p.params[Param::clip] != 0) {
      team.sync();                                                                    // before w changes
      if (zero) solved = MinNorm{K, p.gram, shifted}.solve(team, w, true) && solved;  // the weights at h = 0 itself
      for (int k = team.rank; k < K; k += team.size) w[k] = w[k] < preference(k) ? w[k] : preference(k);
      team.sync();
      multiply(team, K, p.gram, w, products);
      team.sync();
      const double way = std::sqrt(larger(dot(w, products, K), 0)), terms = sum_of_lengths(p, w);
      const bool nothing = way <= rounding * terms;
      cancels = nothing && terms > 0;
      for (int k = team.rank; k < K; k += team.size)
        p.out[k] = rescale * (preference(k) + (nothing ? 0 : s / way * w[k]));
    } else if (s > 0 && (zero || !(norm > 0))) {
      unit_products(team, p, lengths, shifted);
      const DualConeOfUnits cone{K, shifted, lengths};
      solved = cone.project(team, preference, w, shifted + K * K) && solved;
      for (int k = team.rank; k < K; k += team.size) w[k] -= preference(k);
      team.sync();
      multiply(team, K, p.gram, w, products);
      team.sync();
      // It lies in the ball, but for rounding where the gradients' lengths differ too much to tell g_w from zero.
      const double way = std::sqrt(larger(dot(w, products, K), 0)), part = way > s ? s / way : 1;
      for (int k = team.rank; k < K; k += team.size) p.out[k] = rescale * (preference(k) + part * w[k]);
    } else {
      for (int k = team.rank; k < K; k += team.size)
        p.out[k] = rescale * (preference(k) + (s > 0 ? s / norm * w[k] : 0));
    }
    p.tally(team, kUnconverged, !(solved && found));
    p.tally(team, kByNoise, zero || cancels);
    team.sync();
  }

  // sum_k w_k |g_k|.
  MTLFAST_HD static double sum_of_lengths(const Problem& p, const double* w) {
    double sum = 0;
    for (int k = 0; k < p.num_tasks; ++k) sum += w[k] * std::sqrt(p.gram[k * p.num_tasks + k]);
    return sum;
  }
};

}  // namespace mtlfast::solvers

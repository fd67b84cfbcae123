// FairGrad (Ban and Ji, "Fair Resource Allocation in Multi-Task Learning", ICML 2024, Equation 4).
//
// The weights w > 0 with (G w)_i = w_i^(-1/a): alpha-fair shares of progress, of which a = 1 is Nash-MTL's and a large
// a the worst task's. With G over its trace T, unit gradients' products S and b = d w: (S b)_i = d_i^(1/a - 1)
// b_i^(-1/a), and then w times T^(-1 / (1 + 1/a)). Where a combination of the gradients is zero there is no such w:
// then MGDA's, which make the update zero.
#pragma once
#include "fair_point.h"
#include "norms.h"
#include "simplex.h"

namespace mtlfast::solvers {

// alpha: a, 0 for 1 / K each. loss_scale: [1], what the gradients were multiplied by, 1 without it. state: [2], a
// Counter each; a solve without a solution is among the unconverged ones too.
struct FairGrad : Method {
  static constexpr const char* name = "fairgrad";
  MTLFAST_NAMES(Param, alpha, rtol);
  MTLFAST_NAMES(Input, loss_scale);
  static int input_size(int, int) { return 1; }
  static int64_t scratch_size(int K) { return K * K + 2 * K + FairPoint::scratch_size(K) + MinNorm::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    const double a = p.params[Param::alpha], power = 1 / a, size = trace(p.gram, K);
    double *norms = p.scratch, *log_c = norms + K, *S = log_c + K, *rest = S + K * K;
    if (!(a > 0 && size > 0)) {
      for (int k = team.rank; k < K; k += team.size) p.out[k] = a > 0 ? 0 : 1 / static_cast<double>(K);
      team.sync();
      return;
    }
    unit_products(team, p, norms, S);
    for (int k = team.rank; k < K; k += team.size) {
      norms[k] /= std::sqrt(size);
      log_c[k] = norms[k] > 0 ? (power - 1) * std::log(norms[k]) : 0;
    }
    team.sync();
    const auto fair = FairPoint{K, S, log_c, power, p.params[Param::rtol], rest}.solve(team, p.out);
    p.tally(team, kUnconverged, !fair.solved);
    p.tally(team, kByNoise, fair.none);
    if (!fair.solved) {
      MinNorm{K, p.gram, rest}.solve(team, p.out);
      team.sync();
      return;
    }
    const double unscaled = std::sqrt(size) / p.input_or(Input::loss_scale, 0, 1);
    const double scale = std::pow(unscaled, -2 / (1 + power));
    for (int k = team.rank; k < K; k += team.size) p.out[k] = norms[k] > 0 ? scale * p.out[k] / norms[k] : 0;
    team.sync();
  }
};

}  // namespace mtlfast::solvers

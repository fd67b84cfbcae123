// IMTL-G (Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021), as Quinton and Rey ("Jacobian
// Descent for Multi-Objective Optimization", 2024) extend it to gradients that depend on each other: v = G^+ d with the
// norms d, and w = v / sum v. Where G has full rank the update has the same product with every unit gradient.
//
// With S = D^-1 G D^-1 for D = diag(d), G^-1 d = D^-1 S^-1 1: the rank is decided on S, so that tasks whose gradients
// differ by orders of magnitude are not taken for dependent ones.
#pragma once
#include "norms.h"
#include "pseudo_inverse.h"

namespace mtlfast::solvers {

// rtol: where |sum v| is at most that part of sum |v| too, the weights are zero. state: [2], a Counter each.
struct IMTLG : Method {
  static constexpr const char* name = "imtlg";
  MTLFAST_NAMES(Param, rtol);
  static int64_t scratch_size(int K) { return K * K + 3 * K + PseudoInverse::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    const double rtol = p.params[Param::rtol];
    double *S = p.scratch, *norms = S + K * K, *ones = norms + K, *v = ones + K, *rest = v + K;
    unit_products(team, p, norms, S);
    for (int k = team.rank; k < K; k += team.size) ones[k] = 1;
    team.sync();
    const PseudoInverse inverse{K, S, rest};
    auto result = inverse.solve(team, rtol, ones, v);
    const bool independent = result.full_rank;
    if (independent) {
      for (int k = team.rank; k < K; k += team.size) v[k] = norms[k] > 0 ? v[k] / norms[k] : 0;
    } else {
      const double size = trace(p.gram, K), scale = size > 0 ? 1 / size : 0;
      for (int i = team.rank; i < K; i += team.size)
        for (int j = 0; j < K; ++j) S[i * K + j] = p.gram[i * K + j] * scale;
      team.sync();
      result = inverse.solve(team, rtol, norms, v);
    }
    team.sync();
    double total = 0;
    for (int k = 0; k < K; ++k) total += std::fabs(v[k]);
    const double sum = sum_of(v, K);
    const bool cancels = !(std::fabs(sum) > rtol * total);
    for (int k = team.rank; k < K; k += team.size) p.out[k] = cancels ? 0 : v[k] / sum;
    p.tally(team, kUnconverged, !result.solved);
    p.tally(team, kByNoise, !independent || (cancels && total > 0));
    team.sync();
  }
};

}  // namespace mtlfast::solvers

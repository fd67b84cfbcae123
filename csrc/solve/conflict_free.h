// ConFIG (Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks", ICLR 2025).
//
// The direction whose product with every unit gradient is its preference, U^+ p for the unit gradients U. On
// S = U U^T: U^+ p = U^T x with x = S^+ p, which for two tasks is (p_1 - c p_2, p_2 - c p_1) / (1 - c^2) with their
// cosine c. Its length is the sum of the projections on it of the gradients, at their own lengths or all at one.
#pragma once
#include "norms.h"
#include "pseudo_inverse.h"

namespace mtlfast::solvers {

// length: -1 the gradients' own, else a TypicalNorm. task: whose norm that is. preferences: [K], 1 / K each without
// them. state: [2], a Counter each.
struct ConFIG : Method {
  static constexpr const char* name = "config";
  MTLFAST_NAMES(Param, length, task, rtol);
  MTLFAST_NAMES(Input, preferences);
  static int64_t scratch_size(int K) { return K * K + 4 * K + PseudoInverse::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    const double rtol = p.params[Param::rtol];
    double *S = p.scratch, *norms = S + K * K, *preferences = norms + K, *x = preferences + K, *cosines = x + K;
    unit_products(team, p, norms, S);
    for (int k = team.rank; k < K; k += team.size) preferences[k] = p.preference(Input::preferences, k);
    team.sync();
    bool solved = true, independent = true;
    const double c = K == 2 ? S[1] : 1;
    if (1 - std::fabs(c) > rtol && S[0] > 0 && S[3] > 0) {
      for (int k = team.rank; k < K; k += team.size) x[k] = preferences[k] - c * preferences[1 - k];
      team.sync();
    } else {
      const auto result = PseudoInverse{K, S, cosines + K}.solve(team, rtol, preferences, x);
      solved = result.solved;
      independent = result.full_rank;
    }
    multiply(team, K, S, x, cosines);  // times |U^T x|, of which the square is x S x
    team.sync();
    const int length = static_cast<int>(p.params[Param::length]);
    const double typical =
        length < 0 ? 0 : typical_norm(length, p.place(static_cast<int>(p.params[Param::task])), norms, K);
    double projections = 0;
    for (int k = 0; k < K; ++k) projections += cosines[k] * (length < 0 ? norms[k] : typical);
    const double squared = dot(x, cosines, K), factor = squared > 0 ? projections / squared : 0;
    for (int k = team.rank; k < K; k += team.size) p.out[k] = norms[k] > 0 ? factor * x[k] / norms[k] : 0;
    p.tally(team, kUnconverged, !solved);
    p.tally(team, kByNoise, !independent);
    team.sync();
  }
};

}  // namespace mtlfast::solvers

// Aligned-MTL (Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, Algorithm 1).
//
// With G = sum_i l_i u_i u_i^T, the singular values of the Jacobian are made equal: w = sqrt(s) sum_i l_i^(-1/2)
// u_i (u_i p) over the eigenvalues that count, for a preference p and s the smallest, the median or the mean of them.
// As many count as the unit gradients' products have: of G's own, a gradient that is short against the others has a
// small one as well as one that depends on them.
#pragma once
#include "norms.h"
#include "spectrum.h"

namespace mtlfast::solvers {

// scale_mode: 0 min, 1 median, 2 rmse. preferences: [K], 1 / K each without them. state: [2], a Counter each.
struct AlignedMTL : Method {
  static constexpr const char* name = "aligned_mtl";
  MTLFAST_NAMES(Param, scale_mode, rtol);
  MTLFAST_NAMES(Input, preferences);
  static int64_t scratch_size(int K) { return K * K + 2 * K + 2 * Spectrum::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    double *G = p.scratch, *preferences = G + K * K, *norms = preferences + K, *rest = norms + K;
    const double size = trace(p.gram, K), scale = size > 0 ? 1 / size : 0;
    for (int i = team.rank; i < K; i += team.size) {
      for (int j = 0; j < K; ++j) G[i * K + j] = p.gram[i * K + j] * scale;
      preferences[i] = p.preference(Input::preferences, i);
    }
    team.sync();
    const Spectrum spectrum{K, G, rest};
    bool solved = spectrum.solve(team);
    const double rtol = p.params[Param::rtol];
    double least = 0;
    bool dependent = false;
    // Unit gradients are no nearer to dependence than K times, so most often G itself tells that all count.
    if (!(smallest(spectrum) > K * rtol * spectrum.largest())) {
      unit_products(team, p, norms, G);
      const Spectrum of_units{K, G, rest + Spectrum::scratch_size(K)};
      solved = of_units.solve(team) && solved;
      const int rank = of_units.rank(rtol * of_units.largest());
      least = largest_but(spectrum, rank);
      dependent = rank < count_positive(norms, K);
    }
    const double s = typical_value(spectrum, least, p.params[Param::scale_mode]);
    spectrum.apply(team, -0.5, least, preferences, p.out);
    for (int k = team.rank; k < K; k += team.size) p.out[k] = size > 0 ? std::sqrt(s) * p.out[k] : preferences[k];
    p.tally(team, kUnconverged, !solved);
    p.tally(team, kByNoise, dependent);
    team.sync();
  }

 private:
  MTLFAST_HD static double smallest(const Spectrum& spectrum) {
    double least = spectrum.values()[0];
    for (int i = 1; i < spectrum.n; ++i) least = spectrum.values()[i] < least ? spectrum.values()[i] : least;
    return least;
  }

  // The largest eigenvalue behind so many, 0 if there is none.
  MTLFAST_HD static double largest_but(const Spectrum& spectrum, int count) {
    const double* values = spectrum.values();
    double found = 0;
    for (int i = 0; i < spectrum.n; ++i) {
      int above = 0;
      for (int j = 0; j < spectrum.n; ++j) above += values[j] > values[i] || (values[j] == values[i] && j < i);
      if (above >= count) found = larger(found, values[i]);
    }
    return found;
  }

  // Of the eigenvalues above `least`: the smallest, the lower median or the mean.
  MTLFAST_HD static double typical_value(const Spectrum& spectrum, double least, double mode) {
    const double* values = spectrum.values();
    const int n = spectrum.n, count = spectrum.rank(least), wanted = mode == 0 ? 0 : (count - 1) / 2;
    double sum = 0, found = 0;
    for (int i = 0; i < n; ++i) {
      if (!(values[i] > least)) continue;
      int below = 0;
      for (int j = 0; j < n; ++j)
        below += values[j] > least && (values[j] < values[i] || (values[j] == values[i] && j < i));
      if (below == wanted) found = values[i];
      sum += values[i];
    }
    return mode == 2 ? sum / larger(count, 1) : found;
  }
};

}  // namespace mtlfast::solvers

// UPGrad (Quinton and Rey, "Jacobian Descent for Multi-Objective Optimization", 2024) and DualProj (Lopez-Paz and
// Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017): projections onto the dual cone of the
// gradients, the directions that no task minds.
//
// The projection of u J is v J with the v >= u of least v^T G v. With lengths d, S = G_ij / (d_i d_j) and y = d v that
// is min y^T S y over y >= d u, or min 1/2 x^T S x + (S d u)^T x over x = y - d u >= 0. DualProj projects the preferred
// combination; UPGrad projects each task's own part of it and adds the projections up. reg_eps is added to the diagonal
// of S. The lengths are the gradients' own, so that each is regularised relative to itself; or, as TorchJD has it, one
// for all, the root of G's trace.
#pragma once
#include "nonnegative_qp.h"
#include "norms.h"

namespace mtlfast::solvers {

// A cone in terms of gradients over their lengths.
struct DualConeOfUnits {
  int num_tasks;
  const double* products;  // S, [K, K]
  const double* lengths;   // d, [K]; 0 for a zero gradient

  MTLFAST_HD static int scratch_size(int K) { return 2 * K + NonnegativeQP::scratch_size(K); }

  // v of one u. False if the solver gave up.
  template <class Team, class Preference>
  MTLFAST_HD bool project(Team team, Preference u, double* v, double* memory) const {
    const int K = num_tasks;
    double *c = memory, *x = c + K;
    for (int i = team.rank; i < K; i += team.size) {
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += products[i * K + k] * (lengths[k] * u(k));
      c[i] = -sum;
    }
    team.sync();
    const bool solved = NonnegativeQP{K, products, c, x, x + K}.solve(team);
    for (int k = team.rank; k < K; k += team.size) v[k] = u(k) + (lengths[k] > 0 ? x[k] / lengths[k] : 0);
    team.sync();
    return solved;
  }
};

// preferences: [K], 1 / K each without them. of_trace: one length for all? state: [1], kUnconverged.
template <bool Each>
struct DualCone : Method {
  MTLFAST_NAMES(Param, reg_eps, of_trace);
  MTLFAST_NAMES(Input, preferences);
  static int64_t scratch_size(int K) {
    return 2 * K * K + 2 * K + (Each ? kMostParts : 1) * DualConeOfUnits::scratch_size(K);
  }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    double *S = p.scratch, *projections = S + K * K, *failed = projections + K * K, *lengths = failed + K;
    double* rest = lengths + K;
    if (p.params[Param::of_trace] != 0) {
      const double length = std::sqrt(larger(trace(p.gram, K), 0));
      for (int i = team.rank; i < K; i += team.size) {
        lengths[i] = length;
        for (int j = 0; j < K; ++j) S[i * K + j] = length > 0 ? p.gram[i * K + j] / (length * length) : 0;
      }
    } else {
      unit_products(team, p, lengths, S);
    }
    team.sync();
    for (int i = team.rank; i < K; i += team.size) S[i * K + i] += p.params[Param::reg_eps];
    team.sync();
    const DualConeOfUnits cone{K, S, lengths};
    if constexpr (Each) {
      const auto part = part_of(team);
      double* memory = rest + part.index * DualConeOfUnits::scratch_size(K);
      for (int i = part.index; i < K; i += part.count) {
        const auto own = [&](int k) { return k == i ? p.preference(Input::preferences, k) : 0; };
        const bool solved = cone.project(part.team, own, projections + i * K, memory);
        if (part.team.rank == 0) failed[i] = !solved;
      }
    } else {
      const auto all = [&](int k) { return p.preference(Input::preferences, k); };
      const bool solved = cone.project(team, all, projections, rest);
      if (team.rank == 0) failed[0] = !solved;
    }
    team.sync();
    const int count = Each ? K : 1;
    sum_columns(team, count, K, projections, p.out);
    for (int i = 0; i < count; ++i) p.tally(team, kUnconverged, failed[i] > 0);
    team.sync();
  }
};

struct UPGrad : DualCone<true> {
  static constexpr const char* name = "upgrad";
};
struct DualProj : DualCone<false> {
  static constexpr const char* name = "dualproj";
};

}  // namespace mtlfast::solvers

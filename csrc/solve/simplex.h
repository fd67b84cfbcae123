// On the simplex { w >= 0, sum w = 1 }: the point of smallest w^T G w, and the nearest point to a given one.
#pragma once
#include "nonnegative_qp.h"

namespace mtlfast::solvers {

// min w^T G w over the simplex. Wolfe's way ("Finding the nearest point in a polytope", 1976): with any a > 0, the x
// of min 1/2 x^T (G + a 1 1^T) x - a 1^T x over x >= 0 is w times a positive number. `a` is the smallest positive G_ii,
// so that a gradient much smaller than the others is not lost beside it.
struct MinNorm {
  int K;
  const double* gram;  // [K, K]
  double* scratch;     // scratch_size(K)

  MTLFAST_HD static int scratch_size(int K) { return K * K + K + NonnegativeQP::scratch_size(K); }

  // w [K]. Gradients of norm zero share all the weight. False if the solver gave up.
  template <class Team>
  MTLFAST_HD bool solve(Team team, double* w, bool warm = false) const {
    double *H = scratch, *c = H + K * K, a = 0;
    int zeros = 0;
    for (int i = 0; i < K; ++i) {
      const double diagonal = gram[i * K + i];
      zeros += !(diagonal > 0);
      if (diagonal > 0 && (a == 0 || diagonal < a)) a = diagonal;
    }
    if (zeros > 0) {
      for (int i = team.rank; i < K; i += team.size) w[i] = gram[i * K + i] > 0 ? 0 : 1 / static_cast<double>(zeros);
      team.sync();
      return true;
    }
    for (int i = team.rank; i < K; i += team.size) {
      for (int j = 0; j < K; ++j) H[i * K + j] = gram[i * K + j] + a;
      c[i] = a;
    }
    team.sync();
    const bool solved = NonnegativeQP{K, H, c, w, c + K}.solve(team, warm);
    double sum = 0;
    for (int i = 0; i < K; ++i) sum += w[i];
    team.sync();  // before w changes
    for (int i = team.rank; i < K; i += team.size) w[i] /= sum;
    team.sync();
    return solved;
  }
};

// out = the nearest point of the simplex to v (Michelot, "A finite algorithm for finding the projection of a point onto
// the canonical simplex of R^n", 1986): out_i = max(v_i - t, 0), where t falls until the positive ones sum to 1.
// `out` may be v.
template <class Team>
MTLFAST_HD void project_onto_simplex(Team team, int n, const double* v, double* out) {
  double most = v[0];  // taken off first: the sum would round the 1 away beside numbers that are large
  for (int i = 1; i < n; ++i) most = larger(most, v[i]);
  double t = 0;
  for (int turn = 0, count = -1; turn <= n; ++turn) {
    double sum = 0;
    int above = 0;
    for (int i = 0; i < n; ++i)
      if (turn == 0 || v[i] - most > t) sum += v[i] - most, ++above;
    if (above == count) break;
    count = above;
    t = (sum - 1) / above;
  }
  team.sync();  // before `out` changes, which may be v
  for (int i = team.rank; i < n; i += team.size) out[i] = larger(v[i] - most - t, 0);
  team.sync();
}

}  // namespace mtlfast::solvers

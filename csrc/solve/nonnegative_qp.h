// min 1/2 x^T H x - c^T x over x >= 0: the quadratic program behind most Gram aggregators, solved exactly.
//
// Each variable is passive (its equation of H x = c holds) or zero; the equations are solved by Cholesky. Two ways:
// 1. Block principal pivoting (Portugal, Judice and Vicente, "A comparison of block pivoting and interior-point
//    algorithms for linear least squares problems with nonnegative variables", 1994): every variable with a negative x,
//    or a negative y = H x - c, changes sides at once. It takes a handful of turns, and may go in circles.
// 2. Then Lawson and Hanson's active set ("Solving Least Squares Problems", 1974, chapter 23), from where that stood:
//    one variable enters at a time and x never turns negative, so each solution is better than the one before.
// H is scaled to a unit diagonal first, so that tasks may differ by many orders of magnitude, and 1e-12 of it is added:
// where H is singular this picks the smallest scaled x. A last step takes the addition out again.
//
// Neither number grows with the error of the products in H, which may be a million times larger where they were summed
// in float32. The program is solved as it is given; the direction that x stands for is a continuous function of it, so
// nothing is decided here that the error could turn over. A tolerance as large as the error's bound would only add an
// error of that size to solutions that are mostly far more exact.
#pragma once
#include "cholesky.h"

namespace mtlfast::solvers {

struct NonnegativeQP {
  int n;
  const double* H;  // [n, n], positive semidefinite; a variable with H_ii = 0 stays 0
  const double* c;  // [n]
  double* x;        // [n], the solution
  double* scratch;  // scratch_size(n)

  static constexpr double kTolerance = 1e-12;  // of a negative x or y, relative to the largest ones

  MTLFAST_HD static int scratch_size(int n) { return (n + 1) * n + 6 * n; }

  // Solves it; `warm`: begin with the variables that are positive in x. False if it gave up, with the last iterate.
  template <class Team>
  MTLFAST_HD bool solve(Team team, bool warm = false) const {
    for (int i = team.rank; i < n; i += team.size) {
      scale()[i] = H[i * n + i] > 0 ? 1 / std::sqrt(H[i * n + i]) : 0;
      side()[i] = warm && x[i] > 0 && scale()[i] > 0 ? kPassive : kZero;
    }
    team.sync();
    double ridge = 1e-12;
    int fewest = n + 1, patience = 3, entered = -1;
    bool solved = false, blocks = true;  // blocks: the first of the two ways
    for (int turn = 0; turn < 100 + 20 * n && !solved; ++turn) {
      if (!equations(team, ridge)) {
        ridge *= 100;  // H is indefinite by more than rounding: as precise as the gradients behind it
        continue;
      }
      if (!blocks && step_back(team, entered)) continue;
      residuals(team);
      const double largest_x = largest(x, false), tolerance = kTolerance * (largest(c, true) + largest_x);
      int violations = 0, worst = -1;
      for (int i = 0; i < n; ++i) {
        if (!wrong(i, largest_x, tolerance)) continue;
        ++violations;
        if (worst < 0 || y()[i] < y()[worst]) worst = i;
      }
      solved = violations == 0;
      patience = violations < fewest ? 3 : patience - 1;
      if (violations < fewest) fewest = violations;
      team.sync();  // before what was read is changed
      if (!blocks) {
        entered = worst;
        if (team.rank == 0 && worst >= 0) side()[worst] = kPassive;
      } else if (patience >= 0) {
        for (int i = team.rank; i < n; i += team.size)
          if (wrong(i, largest_x, tolerance)) side()[i] = kPassive - side()[i];
      } else {
        blocks = false;
        for (int i = team.rank; i < n; i += team.size) {
          before()[i] = larger(x[i], 0);
          side()[i] = before()[i] > 0 ? kPassive : kZero;
        }
      }
      team.sync();
    }
    if (solved) refine(team);
    for (int i = team.rank; i < n; i += team.size) x[i] = larger(x[i], 0);
    team.sync();
    return solved;
  }

 private:
  static constexpr double kZero = 0, kPassive = 1, kRefused = -1;  // refused: zero, entering did not make it positive

  MTLFAST_HD double* factor() const { return scratch; }  // [n + 1, n]: of the passive variables, and a right-hand side
  MTLFAST_HD double* scale() const { return scratch + (n + 1) * n; }
  MTLFAST_HD double* y() const { return scale() + n; }
  MTLFAST_HD double* side() const { return y() + n; }
  MTLFAST_HD double* order() const { return side() + n; }   // the passive variables
  MTLFAST_HD double* roots() const { return order() + n; }  // the factor's diagonal
  MTLFAST_HD double* before() const { return roots() + n; }

  MTLFAST_HD Cholesky cholesky(int m) const { return {m, n, factor(), roots()}; }

  // The largest |v_i|, scaled as x or as c.
  MTLFAST_HD double largest(const double* v, bool as_c) const {
    double most = 0;
    for (int i = 0; i < n; ++i)
      if (scale()[i] > 0) most = larger(most, std::fabs(as_c ? v[i] * scale()[i] : v[i] / scale()[i]));
    return most;
  }

  MTLFAST_HD bool wrong(int i, double largest_x, double tolerance) const {
    if (scale()[i] == 0 || side()[i] == kRefused) return false;
    return side()[i] == kPassive ? x[i] / scale()[i] < -kTolerance * largest_x : y()[i] < -tolerance;
  }

  // From `before` towards x, as far as nothing turns negative; what became zero leaves. False if x is reached, which
  // then is the next `before`, and refused variables may enter again.
  template <class Team>
  MTLFAST_HD bool step_back(Team team, int entered) const {
    double share = 1;
    int blocking = -1;
    for (int i = 0; i < n; ++i) {
      if (side()[i] != kPassive || x[i] > 0) continue;
      const double of_i = before()[i] > 0 ? before()[i] / (before()[i] - x[i]) : 0;
      if (blocking < 0 || of_i < share) share = of_i, blocking = i;
    }
    team.sync();
    for (int i = team.rank; i < n; i += team.size) {
      before()[i] = blocking < 0 ? x[i] : before()[i] + share * (x[i] - before()[i]);
      if (blocking >= 0 && side()[i] == kPassive && (i == blocking || before()[i] <= 0)) {
        before()[i] = 0;
        side()[i] = i == entered && share == 0 ? kRefused : kZero;
      }
      if (blocking < 0 && side()[i] == kRefused && i != entered) side()[i] = kZero;
    }
    team.sync();
    return blocking >= 0;
  }

  // x of H x = c on the passive variables, 0 elsewhere; false if the scaled H is not positive definite there.
  template <class Team>
  MTLFAST_HD bool equations(Team team, double ridge) const {
    double *A = factor(), *chosen = order();
    const int m = count();
    for (int i = 0, k = 0; i < n && team.rank == 0; ++i)
      if (side()[i] == kPassive) chosen[k++] = i;
    team.sync();
    for (int r = team.rank; r < m; r += team.size) {
      const int i = static_cast<int>(chosen[r]);
      for (int s = 0; s <= r; ++s) {
        const int j = static_cast<int>(chosen[s]);
        A[r * n + s] = H[i * n + j] * scale()[i] * scale()[j] + (r == s ? ridge : 0);
      }
      A[m * n + r] = c[i] * scale()[i];
    }
    for (int i = team.rank; i < n; i += team.size) x[i] = 0;
    team.sync();
    if (!cholesky(m).factorise(team, ridge / 4)) return false;
    add_solution(team, m);
    return true;
  }

  // x += the solution for the right-hand side in row m, by the factor in the rows above it.
  template <class Team>
  MTLFAST_HD void add_solution(Team team, int m) const {
    double* z = factor() + m * n;
    cholesky(m).solve(team, z);
    for (int r = team.rank; r < m; r += team.size) {
      const int i = static_cast<int>(order()[r]);
      x[i] += z[r] * scale()[i];
    }
    team.sync();
  }

  // One step towards the solution without the ridge: it matters where x is large.
  template <class Team>
  MTLFAST_HD void refine(Team team) const {
    const int m = count();
    double* z = factor() + m * n;
    for (int r = team.rank; r < m; r += team.size) {
      const int i = static_cast<int>(order()[r]);
      z[r] = (c[i] - dot(H + i * n, x, n)) * scale()[i];
    }
    team.sync();
    add_solution(team, m);
  }

  MTLFAST_HD int count() const {
    int m = 0;
    for (int i = 0; i < n; ++i) m += side()[i] == kPassive;
    return m;
  }

  // y = H x - c of the variables at zero, scaled.
  template <class Team>
  MTLFAST_HD void residuals(Team team) const {
    for (int i = team.rank; i < n; i += team.size)
      y()[i] = side()[i] == kPassive ? 0 : (dot(H + i * n, x, n) - c[i]) * scale()[i];
    team.sync();
  }
};

}  // namespace mtlfast::solvers

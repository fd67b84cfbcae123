// Eigenvalues and eigenvectors of a positive semidefinite matrix: G = sum_i l_i u_i u_i^T, and functions of it.
//
// G = R^T R by Cholesky's factorisation with diagonal pivoting (where G has rank r, r rows), then one-sided Jacobi
// rotations of the rows of R until they are orthogonal (Veselic and Hari, "A note on a one-sided Jacobi algorithm",
// 1989): a rotation changes no product R^T R, so row i ends as sqrt(l_i) u_i. On a pivoted factor a handful of sweeps
// is enough. The rows of a sweep meet in rounds of disjoint pairs, a worker a pair; which pairs meet when does not
// depend on the team. Convergence is quadratic: after a sweep of little turns there is nothing left to turn.
#pragma once
#include "algebra.h"

namespace mtlfast::solvers {

struct Spectrum {
  int n;
  const double* matrix;  // [n, n]; negative eigenvalues count as zero
  double* scratch;       // scratch_size(n)

  static constexpr int kSweeps = 40;
  static constexpr double kLittle = 1e-8;  // a turn's tangent, and the cosine that it removes

  MTLFAST_HD static int scratch_size(int n) { return n * n + 3 * n; }

  // Finds them. False if the last sweep still turned rows by much.
  template <class Team>
  MTLFAST_HD bool solve(Team team) const {
    factorise(team);
    const int even = n + n % 2;
    bool settled = false;
    for (int sweep = 0; sweep < kSweeps && !settled; ++sweep) {
      for (int k = team.rank; k < n; k += team.size) {
        turned()[k] = 0;
        values()[k] = dot(row(k), row(k), n);  // anew: rotations keep them up to date, but for their rounding
      }
      team.sync();
      for (int round = 0; round + 1 < even; ++round) {
        // A round robin: the last stays, the others move on by one place a round.
        for (int pair = team.rank; pair < even / 2; pair += team.size) {
          const int a = (round + pair) % (even - 1);
          const int b = pair == 0 ? even - 1 : (round - pair + even - 1) % (even - 1);
          if (a < n && b < n && rotate(a, b)) turned()[pair] = 1;
        }
        team.sync();
      }
      settled = !(sum_of(turned(), n) > 0);
      team.sync();
    }
    for (int i = team.rank; i < n; i += team.size) values()[i] = dot(row(i), row(i), n);
    team.sync();
    return settled;
  }

  // sqrt(l_i) u_i, and l_i; in no particular order.
  MTLFAST_HD double* row(int i) const { return scratch + i * n; }
  MTLFAST_HD double* values() const { return scratch + n * n; }

  MTLFAST_HD double largest() const {
    double most = 0;
    for (int i = 0; i < n; ++i) most = larger(most, values()[i]);
    return most;
  }

  // How many eigenvalues are above `least`.
  MTLFAST_HD int rank(double least) const {
    int count = 0;
    for (int i = 0; i < n; ++i) count += values()[i] > least;
    return count;
  }

  // out = sum_i l_i^power u_i (u_i v) over the eigenvalues above `least`: with power -1 the pseudo-inverse times v.
  template <class Team>
  MTLFAST_HD void apply(Team team, double power, double least, const double* v, double* out) const {
    double* shares = turned();
    for (int i = team.rank; i < n; i += team.size) {
      const double value = values()[i];
      shares[i] = value > least ? dot(row(i), v, n) * std::pow(value, power - 1) : 0;
    }
    team.sync();
    for (int k = team.rank; k < n; k += team.size) {
      double sum = 0;
      for (int i = 0; i < n; ++i) sum += shares[i] * row(i)[k];
      out[k] = sum;
    }
    team.sync();
  }

 private:
  MTLFAST_HD double* turned() const { return values() + n; }  // was a pair turned by much in this sweep?
  MTLFAST_HD double* left() const { return turned() + n; }    // the diagonal of what is not factorised yet

  // Rows of R, the largest pivot first; zero where nothing but rounding is left.
  template <class Team>
  MTLFAST_HD void factorise(Team team) const {
    for (int k = team.rank; k < n; k += team.size) left()[k] = matrix[k * n + k];
    team.sync();
    double first = 0;
    for (int i = 0; i < n; ++i) {
      int pivot = 0;
      for (int k = 1; k < n; ++k)
        if (left()[k] > left()[pivot]) pivot = k;
      const double most = left()[pivot], root = std::sqrt(larger(most, 0));
      if (i == 0) first = most;
      const bool rest = !(most > 1e-16 * first);
      team.sync();  // before what was read is changed
      for (int k = team.rank; k < n; k += team.size) {
        double entry = rest ? 0 : matrix[pivot * n + k];
        for (int j = 0; j < i && !rest; ++j) entry -= row(j)[pivot] * row(j)[k];
        row(i)[k] = rest ? 0 : entry / root;
        left()[k] -= row(i)[k] * row(i)[k];
        if (k == pivot) left()[k] = 0;
      }
      team.sync();
    }
  }

  // Turns two rows in their plane until they are orthogonal; was it by much?
  MTLFAST_HD bool rotate(int first, int second) const {
    double *a = row(first), *b = row(second), &aa = values()[first], &bb = values()[second];
    const double ab = dot(a, b, n);
    if (!(ab * ab > 1e-30 * aa * bb)) return false;
    const double gap = bb - aa, root = std::sqrt(gap * gap + 4 * ab * ab);
    const double tangent = 2 * ab / (gap < 0 ? gap - root : gap + root);
    const double cosine = 1 / std::sqrt(1 + tangent * tangent), sine = cosine * tangent;
    const bool much = std::fabs(tangent) > kLittle || ab * ab > kLittle * kLittle * aa * bb;
    aa -= tangent * ab;
    bb += tangent * ab;
    for (int k = 0; k < n; ++k) {
      const double left = a[k], right = b[k];
      a[k] = cosine * left - sine * right;
      b[k] = sine * left + cosine * right;
    }
    return much;
  }
};

}  // namespace mtlfast::solvers

// x = M^+ v for a positive semidefinite M whose eigenvalues up to rtol times the largest count as zero.
//
// Where M certainly has full rank, by Cholesky: its least eigenvalue is at least 1 / trace(M^-1), its largest at most
// the root of the sum of its squared entries. Else from the spectrum, which takes twenty times as long.
#pragma once
#include "cholesky.h"
#include "spectrum.h"

namespace mtlfast::solvers {

struct PseudoInverse {
  int n;
  const double* matrix;  // [n, n]
  double* scratch;       // scratch_size(n)

  MTLFAST_HD static int scratch_size(int n) { return n * n + 2 * n + Spectrum::scratch_size(n); }

  struct Result {
    bool solved;     // false: the spectrum was not found
    bool full_rank;  // by rtol, but for rows of zeros
    bool inside;     // is v more than rounding in M's range? If not, x is zero
  };

  template <class Team>
  MTLFAST_HD Result solve(Team team, double rtol, const double* v, double* x) const {
    double *factor = scratch, *roots = factor + n * n, *squares = roots + n, *rest = squares + n;
    for (int i = team.rank; i < n; i += team.size) {
      for (int j = 0; j <= i; ++j) factor[i * n + j] = matrix[i * n + j];
      x[i] = v[i];
    }
    team.sync();
    const Cholesky cholesky{n, n, factor, roots};
    if (cholesky.factorise(team, 0)) {
      for (int i = team.rank; i < n; i += team.size) squares[i] = dot(matrix + i * n, matrix + i * n, n);
      team.sync();
      const double most = std::sqrt(sum_of(squares, n));
      team.sync();
      cholesky.inverse_squares(team, rest, squares);
      if (most * rtol * sum_of(squares, n) < 1) {
        cholesky.solve(team, x);
        return {true, true, true};
      }
    }
    team.sync();  // before `rest` changes
    const Spectrum spectrum{n, matrix, rest};
    const bool solved = spectrum.solve(team);
    const double largest = spectrum.largest(), least = rtol * largest;
    spectrum.apply(team, -1, least, v, x);
    // v^T M^+ v is at least the square of v's part in the range, over the largest eigenvalue.
    const bool inside = dot(v, x, n) * largest > rtol * rtol * dot(v, v, n);
    int rows = 0;
    for (int i = 0; i < n; ++i) rows += matrix[i * n + i] > 0;
    team.sync();  // before x changes
    for (int i = team.rank; i < n && !inside; i += team.size) x[i] = 0;
    team.sync();
    return {solved, spectrum.rank(least) == rows, inside};
  }
};

}  // namespace mtlfast::solvers

// A x = b for a positive definite A, by Cholesky's factorisation A = L L^T.
#pragma once
#include "algebra.h"

namespace mtlfast::solvers {

struct Cholesky {
  int n, stride;
  double* A;      // [n, n] with rows `stride` apart, the lower triangle; becomes L below its diagonal
  double* roots;  // [n], L's diagonal

  // False if a pivot is not above `least`: then A, as precise as it is, is not positive definite.
  template <class Team>
  MTLFAST_HD bool factorise(Team team, double least) const {
    for (int j = 0; j < n; ++j) {
      const double pivot = row(j)[j] - dot(row(j), row(j), j);
      if (!(pivot > least)) {
        team.sync();  // others may still read
        return false;
      }
      const double root = std::sqrt(pivot);
      if (team.rank == 0) roots[j] = root;
      for (int i = j + 1 + team.rank; i < n; i += team.size) row(i)[j] = (row(i)[j] - dot(row(i), row(j), j)) / root;
      team.sync();
    }
    return true;
  }

  // b [n] becomes x.
  template <class Team>
  MTLFAST_HD void solve(Team team, double* b) const {
    for (int j = 0; j < n; ++j) {
      const double v = b[j] / roots[j];
      team.sync();
      if (team.rank == 0) b[j] = v;
      for (int i = j + 1 + team.rank; i < n; i += team.size) b[i] -= row(i)[j] * v;
      team.sync();
    }
    for (int j = n - 1; j >= 0; --j) {
      const double v = b[j] / roots[j];
      team.sync();
      if (team.rank == 0) b[j] = v;
      for (int k = team.rank; k < j; k += team.size) b[k] -= row(j)[k] * v;
      team.sync();
    }
  }

  // squares[k] = |L^-1 e_k|^2, which add up to trace(A^-1); `columns` [n, n] is scratch.
  template <class Team>
  MTLFAST_HD void inverse_squares(Team team, double* columns, double* squares) const {
    for (int k = team.rank; k < n; k += team.size) {
      double *column = columns + k * n, sum = 0;
      for (int i = k; i < n; ++i) {
        column[i] = ((i == k) - dot(row(i) + k, column + k, i - k)) / roots[i];
        sum += column[i] * column[i];
      }
      squares[k] = sum;
    }
    team.sync();
  }

  MTLFAST_HD double* row(int i) const { return A + i * stride; }
};

}  // namespace mtlfast::solvers

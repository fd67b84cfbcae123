// Small dense algebra that solvers share. Each element is computed by one worker in a fixed order, so results do not
// depend on the size of the team.
#pragma once
#include <cmath>

#include "team.h"

namespace mtlfast::solvers {

// Four running sums: one would wait for each addition to end.
MTLFAST_HD inline double dot(const double* a, const double* b, int n) {
  double sums[4] = {0, 0, 0, 0};
  int k = 0;
  for (; k + 4 <= n; k += 4)
    for (int s = 0; s < 4; ++s) sums[s] += a[k + s] * b[k + s];
  for (; k < n; ++k) sums[0] += a[k] * b[k];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// out = M v for a square M; the caller syncs before it reads `out`.
template <class Team>
MTLFAST_HD void multiply(Team team, int n, const double* matrix, const double* v, double* out) {
  for (int i = team.rank; i < n; i += team.size) out[i] = dot(matrix + i * n, v, n);
}

// out[k] = the sum of column k of a matrix [rows, n]; the caller syncs before it reads `out`.
template <class Team>
MTLFAST_HD void sum_columns(Team team, int rows, int n, const double* matrix, double* out) {
  for (int k = team.rank; k < n; k += team.size) {
    double sum = 0;
    for (int i = 0; i < rows; ++i) sum += matrix[i * n + k];
    out[k] = sum;
  }
}

MTLFAST_HD inline double sum_of(const double* v, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += v[i];
  return sum;
}

MTLFAST_HD inline int count_positive(const double* v, int n) {
  int count = 0;
  for (int i = 0; i < n; ++i) count += v[i] > 0;
  return count;
}

MTLFAST_HD inline double trace(const double* matrix, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += matrix[i * n + i];
  return sum;
}

MTLFAST_HD inline double larger(double a, double b) { return a > b ? a : b; }

}  // namespace mtlfast::solvers

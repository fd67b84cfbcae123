// The positive b with (S b)_i = c_i b_i^(-p) for the unit gradients' products S: where each task gains in proportion to
// a power of its own weight. It minimises 1/2 b^T S b - sum_i c_i b_i^(1-p) / (1-p) (with p = 1: c_i log b_i), which is
// strictly convex, so it is the only one; there is none where a combination of the gradients is zero.
//
// Newton's method on x = log b: with pull = b (S b) and push = c b^(1-p), both equal at the solution, the step d solves
// (B S B + p max(pull, push)) d = push - pull, a positive definite system that is Newton's own at the solution. Taken
// as that maximum its steps stop short, where tasks hardly meet, of what each needs. A fall is of e^d; a rise of (1 + q
// d)^(1/q), q = min(1, p), less than that, as a weight that overshot falls slowly where p is large. Steps are halved
// until the function no longer rises much along them.
#pragma once
#include "cholesky.h"

namespace mtlfast::solvers {

struct FairPoint {
  int n;
  const double* S;      // [n, n], diagonal 1 (or a row of zeros: that b is not looked for, and 0)
  const double* log_c;  // [n]
  double p;             // > 0
  double rtol;          // where |b U|^2 / (sum b)^2 is no more than this, or kLeast, for unit gradients U, it is zero
  double* scratch;      // scratch_size(n)

  static constexpr double kLow = -80;      // a log b so far below the largest is left there: such a task has no say
  static constexpr double kSlope = 0.9;    // of the slope at the start, at the end of a step
  static constexpr double kExact = 1e-15;  // rounding of an exponent, relative
  static constexpr double kLeast = 1e-12;  // what is left of sums that cancel is rounding
  static constexpr int kTurns = 500;       // six is usual

  MTLFAST_HD static int scratch_size(int n) { return n * n + 9 * n; }

  struct Result {
    bool solved;  // false: there is no such b, or it was not found
    bool none;    // a combination of the gradients is no longer than rounding
  };

  // b [n].
  template <class Team>
  MTLFAST_HD Result solve(Team team, double* b) const {
    start(team, b);
    bool solved = false, none = false, close = false;
    for (int turn = 0; turn < kTurns && !solved; ++turn) {
      double worst = 0, of_push = 0, sum = 0, squared = 0, exponent = 8, highest = x()[0];
      for (int i = 1; i < n; ++i) highest = larger(highest, x()[i]);
      for (int i = 0; i < n; ++i) {
        const double residual = std::fabs(push()[i] - pull()[i]);
        if (x()[i] > highest + kLow || push()[i] > pull()[i]) {
          worst = larger(worst, residual / size()[i]);
          of_push = larger(of_push, residual / push()[i]);
        }
        sum += b[i];
        squared += pull()[i];
        exponent = larger(exponent, std::fabs(log_c[i]) + std::fabs((1 - p) * x()[i]));
      }
      team.sync();  // before what was read is changed
      none = !(squared > larger(rtol, kLeast) * sum * sum);
      if (none) break;
      // Where gradients nearly cancel, a small residual says less: then one more step.
      const bool small = worst <= 4 * kExact * exponent;
      solved = small && (close || of_push <= 1e-11);
      close = small;
      if (!solved && !step(team, b)) break;
    }
    for (int i = team.rank; i < n; i += team.size)
      if (!(S[i * n + i] > 0)) b[i] = 0;
    team.sync();
    return {solved, none};
  }

 private:
  MTLFAST_HD double* x() const { return scratch + n * n; }
  MTLFAST_HD double* pull() const { return x() + n; }
  MTLFAST_HD double* push() const { return pull() + n; }
  MTLFAST_HD double* size() const { return push() + n; }  // what the rounding of push - pull is relative to
  MTLFAST_HD double* d() const { return size() + n; }
  MTLFAST_HD double* scale() const { return d() + n; }
  MTLFAST_HD double* roots() const { return scale() + n; }
  MTLFAST_HD double* trial() const { return roots() + n; }
  MTLFAST_HD double* sizes() const { return trial() + n; }  // of the trial

  // S_ij, with 1 on the diagonal of a row of zeros.
  MTLFAST_HD double product(int i, int j) const { return i == j ? 1 : S[i * n + j]; }

  // Where the tasks would stand alone, c_i^(1 / (1 + p)), times what is best for all.
  template <class Team>
  MTLFAST_HD void start(Team team, double* b) const {
    for (int i = team.rank; i < n; i += team.size) trial()[i] = log_c[i] / (1 + p);
    team.sync();
    evaluate(team, b);
    double pulls = 0, pushes = 0;
    for (int i = 0; i < n; ++i) {
      pulls += pull()[i];
      pushes += push()[i];
    }
    const double shift = pulls > 0 ? std::log(pushes / pulls) / (1 + p) : 0;
    team.sync();
    for (int i = team.rank; i < n; i += team.size) trial()[i] += shift;
    team.sync();
    evaluate(team, b);
    accept(team);
  }

  // b, pull, push and sizes at the trial.
  template <class Team>
  MTLFAST_HD void evaluate(Team team, double* b) const {
    for (int i = team.rank; i < n; i += team.size) b[i] = std::exp(trial()[i]);
    team.sync();
    for (int i = team.rank; i < n; i += team.size) {
      double sum = 0, magnitude = 0;
      for (int j = 0; j < n; ++j) {
        sum += product(i, j) * b[j];
        magnitude += std::fabs(product(i, j)) * b[j];
      }
      pull()[i] = b[i] * sum;
      push()[i] = std::exp(log_c[i] + (1 - p) * trial()[i]);
      sizes()[i] = push()[i] + b[i] * magnitude;
    }
    team.sync();
  }

  template <class Team>
  MTLFAST_HD void accept(Team team) const {
    for (int i = team.rank; i < n; i += team.size) {
      x()[i] = trial()[i];
      size()[i] = sizes()[i];
    }
    team.sync();
  }

  // One step of Newton's, shortened where it must be. False if its equations have no solution.
  template <class Team>
  MTLFAST_HD bool step(Team team, double* b) const {
    double* M = scratch;
    for (int i = team.rank; i < n; i += team.size)
      scale()[i] = 1 / std::sqrt(b[i] * b[i] + p * larger(pull()[i], push()[i]));
    team.sync();
    for (int i = team.rank; i < n; i += team.size) {
      for (int j = 0; j < i; ++j) M[i * n + j] = product(i, j) * (b[i] * scale()[i]) * (b[j] * scale()[j]);
      M[i * n + i] = 1;
      d()[i] = (push()[i] - pull()[i]) * scale()[i];
    }
    team.sync();
    const Cholesky cholesky{n, n, M, roots()};
    if (!cholesky.factorise(team, 0)) return false;
    cholesky.solve(team, d());
    double slope = 0, rounding = 0;
    for (int i = 0; i < n; ++i) {
      const double of_i = d()[i] * scale()[i];
      slope += (push()[i] - pull()[i]) * of_i;
      rounding += kExact * size()[i] * std::fabs(of_i);
    }
    team.sync();
    for (int i = team.rank; i < n; i += team.size) d()[i] *= scale()[i];
    team.sync();
    const double q = p < 1 ? p : 1;
    double share = 1;
    for (int half = 0; half < 40; ++half, share /= 2) {
      for (int i = team.rank; i < n; i += team.size) {
        const double move = share * d()[i];
        trial()[i] = x()[i] + (move > 0 ? std::log1p(q * move) / q : move);
      }
      team.sync();
      double highest = trial()[0];
      for (int i = 1; i < n; ++i) highest = larger(highest, trial()[i]);
      team.sync();
      for (int i = team.rank; i < n; i += team.size) trial()[i] = larger(trial()[i], highest + kLow);
      team.sync();
      evaluate(team, b);
      double end = 0;
      for (int i = 0; i < n; ++i) end += (pull()[i] - push()[i]) * d()[i] / (d()[i] > 0 ? 1 + q * share * d()[i] : 1);
      team.sync();
      if (end <= kSlope * slope + rounding) break;
    }
    accept(team);
    return true;
  }
};

}  // namespace mtlfast::solvers

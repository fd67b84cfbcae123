// GradVac (Wang et al., "Gradient Vaccine", ICLR 2021, Algorithm 1) on the Gram matrix.
//
// As PCGrad, but gradient i is turned until its cosine with g_j is the one that the pair has had on average, f_ij,
// where its cosine t is below that:  c_j += |c J| (f sqrt(1 - t^2) - t sqrt(1 - f^2)) / (|g_j| sqrt(1 - f^2)). Then
// f_ij = (1 - beta) f_ij + beta t, for every pair that meets.
#pragma once
#include "algebra.h"
#include "order.h"

namespace mtlfast::solvers {

// eps: an absolute number that TorchJD adds to denominators, or 0. keys: [K, K], ascending order without them. state:
// [n + 1, n], of all tasks that the user has: a row with the number of solves that skipped a pair since a gradient had
// vanished to rounding, then f. Worker r takes gradients r, r + size, ... and their rows of the state; zero
// gradients have no cosine.
struct GradVac : Method {
  static constexpr const char* name = "gradvac";
  MTLFAST_NAMES(Param, beta, eps, rtol);
  MTLFAST_NAMES(Input, keys);
  static int input_size(int, int K) { return K * K; }
  static int64_t state_size(int known) { return (known + 1) * known; }
  static constexpr double kLeast = 1e-8;  // added to sqrt(1 - f^2), which is 0 for gradients that were always parallel
  static int64_t scratch_size(int K) { return 2 * K * K + K; }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    int known = 0;
    while ((known + 2) * (known + 1) <= p.state_size) ++known;
    double *means = p.state + known, *vanished = p.scratch + 2 * K * K;
    const double beta = p.params[Param::beta], eps = p.params[Param::eps], least = eps > 0 ? 0 : kLeast;
    for (int i = team.rank; i < K; i += team.size) {
      double *c = p.scratch + i * K, *products = p.scratch + (K + i) * K;  // products: of c J with each gradient
      for (int k = 0; k < K; ++k) {
        c[k] = k == i;
        products[k] = p.gram[i * K + k];
      }
      vanished[i] = 0;
      const Order order = Order::of(p.inputs[Input::keys], K, i);
      for (int j = order.next(-1); j >= 0; j = order.next(j)) {
        const double norm = std::sqrt(larger(dot(products, c, K), 0)), norm_j = std::sqrt(p.gram[j * K + j]);
        double magnitude = 0;  // what the norm's rounding error is relative to
        for (int k = 0; k < K; ++k) magnitude += std::fabs(c[k]) * std::sqrt(p.gram[k * K + k]);
        if (!(norm * norm > p.params[Param::rtol] * magnitude * magnitude)) {
          vanished[i] = magnitude > 0;
          continue;
        }
        if (!(norm_j > 0)) continue;
        double& target = means[p.task(i) * known + p.task(j)];
        double cosine = products[j] / (norm * norm_j + eps);
        if (std::fabs(cosine) > 1) cosine = cosine > 0 ? 1 : -1;  // rounding, where little is left of the gradient
        if (cosine < target) {
          const double sine = std::sqrt(larger(1 - cosine * cosine, 0));
          const double target_sine = std::sqrt(larger(1 - target * target, 0));
          const double step = norm * (target * sine - cosine * target_sine) / (norm_j * (target_sine + least) + eps);
          c[j] += step;
          for (int k = 0; k < K; ++k) products[k] += step * p.gram[j * K + k];
        }
        target = (1 - beta) * target + beta * cosine;
      }
    }
    team.sync();
    if (team.rank == 0) p.state[0] += count_positive(vanished, K) > 0;
    sum_columns(team, K, K, p.scratch, p.out);
    team.sync();
  }
};

}  // namespace mtlfast::solvers

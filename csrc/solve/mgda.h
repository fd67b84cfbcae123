// MGDA (Desideri 2012; Sener and Koltun, "Multi-Task Learning as Multi-Objective Optimization", NeurIPS 2018): the
// weights on the simplex whose combined gradient is shortest, min w^T G w.
//
// With least weights c (Lin et al., "A Pareto-Efficient Algorithm for Multiple Objective Optimization in E-Commerce
// Recommendation", RecSys 2019) w >= c as well. Then w = c + r v, with r = 1 - sum c and v on the simplex, and w J is
// the combination by v of the points c J + r g_i: the same problem with their products in place of G.
#pragma once
#include "simplex.h"

namespace mtlfast::solvers {

// epsilon: 0 to the optimum, else Frank-Wolfe until a step is below it, max_iters steps at most. norms: what each
// gradient is divided by first, 0 nothing, 1 its norm, 2 its loss, 3 both. losses: [K], for 2 and 3. min_weights: [K],
// c, at least 0 and at most 1 together; 0 without them. state: [1], kUnconverged.
struct MGDA : Method {
  static constexpr const char* name = "mgda";
  MTLFAST_NAMES(Param, epsilon, max_iters, norms);
  MTLFAST_NAMES(Input, losses, min_weights);
  static bool needs_input(int input, const double* params) {
    return input == Input::losses && params[Param::norms] >= 2;
  }
  static int64_t scratch_size(int K) { return K * K + 2 * K + MinNorm::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks, norms = static_cast<int>(p.params[Param::norms]);
    double *scale = p.scratch, *scaled = scale + K, *rest = scaled + K * K;
    for (int i = team.rank; i < K; i += team.size) {
      const double norm = (norms & 1) != 0 ? std::sqrt(p.gram[i * K + i]) : 1;
      const double divisor = (norms & 2) != 0 ? norm * p.inputs[Input::losses][i] : norm;
      scale[i] = divisor != 0 ? 1 / divisor : 0;
    }
    team.sync();
    for (int i = team.rank; i < K; i += team.size)
      for (int j = 0; j < K; ++j) scaled[i * K + j] = p.gram[i * K + j] * (scale[i] * scale[j]);
    team.sync();
    const double* least = p.inputs[Input::min_weights];
    const double left = least ? larger(1 - sum_of(least, K), 0) : 1;
    if (least) shift(team, K, least, left, scaled, p.out);
    if (p.params[Param::epsilon] > 0) {
      frank_wolfe(team, K, scaled, p.params[Param::epsilon], static_cast<int>(p.params[Param::max_iters]), p.out, rest);
    } else {
      p.tally(team, kUnconverged, !MinNorm{K, scaled, rest}.solve(team, p.out));
    }
    for (int i = team.rank; least && i < K; i += team.size) p.out[i] = least[i] + left * p.out[i];
    team.sync();
  }

  // From the products of g_i to those of c J + r g_i, in place. `products`: [K], scratch.
  template <class Team>
  MTLFAST_HD static void shift(Team team, int K, const double* c, double r, double* gram, double* products) {
    multiply(team, K, gram, c, products);
    team.sync();
    const double square = dot(c, products, K);  // |c J|^2
    for (int i = team.rank; i < K; i += team.size)
      for (int j = 0; j < K; ++j) gram[i * K + j] = square + r * (products[i] + products[j]) + r * r * gram[i * K + j];
    team.sync();
  }

  // Algorithm 2 of the paper, from uniform weights.
  template <class Team>
  MTLFAST_HD static void frank_wolfe(Team team, int K, const double* gram, double epsilon, int max_iters, double* w,
                                     double* products) {
    for (int i = team.rank; i < K; i += team.size) w[i] = 1 / static_cast<double>(K);
    team.sync();
    for (int turn = 0; turn < max_iters; ++turn) {
      multiply(team, K, gram, w, products);
      team.sync();
      int best = 0;
      for (int i = 1; i < K; ++i)
        if (products[i] < products[best]) best = i;
      const double a = products[best], b = dot(w, products, K), c = gram[best * K + best];
      const double gamma = c <= a ? 1 : b <= a ? 0 : (b - a) / (b + c - 2 * a);
      team.sync();
      for (int i = team.rank; i < K; i += team.size) w[i] = (1 - gamma) * w[i] + (i == best ? gamma : 0);
      team.sync();
      if (gamma < epsilon) break;
    }
  }
};

}  // namespace mtlfast::solvers

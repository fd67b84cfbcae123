// Nash-MTL (Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, Algorithm 1).
//
// The weights w > 0 with (G w)_i = c_i / w_i: the bargaining solution, found exactly. c = 1, or K p / sum p for the
// tasks' preferences p, their bargaining powers (Kalai, "Nonsymmetric Nash Solutions and Replications of 2-Person
// Bargaining", 1977). With unit gradients' products S and b = d w it is (S b)_i = c_i / b_i. Its update has the length
// sqrt(K), whatever the gradients'; one longer than max_norm is shortened to that. New weights every
// `update_weights_every` steps; between them the last ones. Where a combination of the gradients is zero there is no
// such w: then MGDA's, which make the update zero.
#pragma once
#include "fair_point.h"
#include "norms.h"
#include "simplex.h"

namespace mtlfast::solvers {

// max_norm: 0 for none. loss_scale: [1], what the losses were multiplied by, 1 without it. preferences: [K], positive.
// state: [3 + n]: a Counter each (a solve without a solution is among the unconverged ones too), steps; then each
// task's last weight, 0 if it has none.
struct NashMTL : Method {
  static constexpr const char* name = "nash_mtl";
  MTLFAST_NAMES(Param, max_norm, update_weights_every, rtol);
  MTLFAST_NAMES(Input, loss_scale, preferences);
  static int input_size(int input, int K) { return input == Input::loss_scale ? 1 : K; }
  static int64_t state_size(int known) { return 3 + known; }
  static int64_t scratch_size(int K) { return K * K + 3 * K + FairPoint::scratch_size(K) + MinNorm::scratch_size(K); }

  template <class Team>
  MTLFAST_HD static void solve(Team team, const Problem& p) {
    const int K = p.num_tasks;
    double *w = p.scratch, *steps = p.state + 2, *kept = p.state + 3;
    bool due = std::fmod(*steps, p.params[Param::update_weights_every]) == 0;
    for (int k = 0; k < K; ++k) due = due || !(kept[p.task(k)] > 0);
    team.sync();  // before the state changes
    if (due) bargain(team, p, w);
    for (int k = team.rank; k < K; k += team.size) {
      if (due)
        kept[p.task(k)] = w[k];
      else
        w[k] = kept[p.task(k)];
    }
    if (team.rank == 0) *steps += 1;
    team.sync();
    double* products = w + K;
    multiply(team, K, p.gram, w, products);
    team.sync();
    const double length = std::sqrt(larger(dot(w, products, K), 0)),
                 most = p.params[Param::max_norm] * p.input_or(Input::loss_scale, 0, 1);
    for (int k = team.rank; k < K; k += team.size) p.out[k] = most > 0 && length > most ? w[k] * (most / length) : w[k];
    team.sync();
  }

 private:
  template <class Team>
  MTLFAST_HD static void bargain(Team team, const Problem& p, double* w) {
    const int K = p.num_tasks;
    double *log_c = w + K, *norms = log_c + K, *S = norms + K, *rest = S + K * K;
    unit_products(team, p, norms, S);
    const double* preferences = p.inputs[Input::preferences];
    const double mean = preferences ? sum_of(preferences, K) / K : 1;
    for (int k = team.rank; k < K; k += team.size) log_c[k] = preferences ? std::log(preferences[k] / mean) : 0;
    team.sync();
    if (!(trace(p.gram, K) > 0)) {
      for (int k = team.rank; k < K; k += team.size) w[k] = 0;
      team.sync();
      return;
    }
    const auto fair = FairPoint{K, S, log_c, 1, p.params[Param::rtol], rest}.solve(team, w);
    p.tally(team, kUnconverged, !fair.solved);
    p.tally(team, kByNoise, fair.none);
    if (!fair.solved) {
      MinNorm{K, p.gram, rest}.solve(team, w);
      return;
    }
    for (int k = team.rank; k < K; k += team.size)
      w[k] = norms[k] > 0 ? p.input_or(Input::loss_scale, 0, 1) * w[k] / norms[k] : 0;
    team.sync();
  }
};

}  // namespace mtlfast::solvers

// What methods make of the norms of the gradients: unit gradients' products, and a norm that stands for all.
#pragma once
#include "algebra.h"

namespace mtlfast::solvers {

// norms[k] = |g_k|.
template <class Team>
MTLFAST_HD void find_norms(Team team, const Problem& p, double* norms) {
  for (int k = team.rank; k < p.num_tasks; k += team.size) norms[k] = std::sqrt(larger(p.gram[k * p.num_tasks + k], 0));
  team.sync();
}

// norms[i] = |g_i|, and S_ij = G_ij / (|g_i| |g_j|), 0 for a zero gradient.
template <class Team>
MTLFAST_HD void unit_products(Team team, const Problem& p, double* norms, double* S) {
  const int K = p.num_tasks;
  find_norms(team, p, norms);
  for (int i = team.rank; i < K; i += team.size)
    for (int j = 0; j < K; ++j) {
      const bool both = norms[i] > 0 && norms[j] > 0;
      S[i * K + j] = !both ? 0 : i == j ? 1 : p.gram[i * K + j] / norms[i] / norms[j];
    }
  team.sync();
}

// Which norm stands for all of them: mtlfast.aggregation lists the same names in the same order.
enum TypicalNorm { kMean, kGeometric, kHarmonic, kMin, kMax, kMedian, kOfTask };

// That norm, over the gradients that are not zero (0 if all are); `task`: whose, for kOfTask. Median: the lower one.
MTLFAST_HD inline double typical_norm(int kind, int task, const double* norms, int n) {
  if (kind == kOfTask) return norms[task];
  int count = 0;
  double sum = 0, least = 0, most = 0;
  for (int i = 0; i < n; ++i) {
    if (!(norms[i] > 0)) continue;
    least = count == 0 || norms[i] < least ? norms[i] : least;
    most = larger(most, norms[i]);
    sum += kind == kGeometric ? std::log(norms[i]) : kind == kHarmonic ? 1 / norms[i] : norms[i];
    ++count;
  }
  if (count == 0) return 0;
  if (kind == kMin) return least;
  if (kind == kMax) return most;
  if (kind == kGeometric) return std::exp(sum / count);
  if (kind == kHarmonic) return count / sum;
  if (kind == kMean) return sum / count;
  for (int i = 0; i < n; ++i) {
    int below = 0, same = 0;
    for (int j = 0; j < n; ++j) {
      below += norms[j] > 0 && norms[j] < norms[i];
      same += norms[j] == norms[i];
    }
    const int middle = (count - 1) / 2;
    if (norms[i] > 0 && below <= middle && middle < below + same) return norms[i];
  }
  return 0;
}

}  // namespace mtlfast::solvers

// One group's solve: which of its tasks have a part, whether their numbers are finite, and the method on those.
//
// A mask takes tasks out as if they had not been given: matrix, inputs and tasks of the others are packed, the method
// sees those alone, and its result is put back among zeros. No method knows of it.
#pragma once
#include "algebra.h"
#include "team.h"

namespace mtlfast::solvers {

// Memory of one group. The method's scratch comes last, since only the host knows how large it is.
struct Workspace {
  double* memory;       // packed_size doubles, then the method's scratch
  int64_t packed_size;  // 0 without a mask

  MTLFAST_HD double* scratch() const { return memory + packed_size; }
};

template <class Method>
int64_t packed_size(int64_t K) {
  int64_t size = 2 * K + Method::Input::count + Method::Param::count + K * K;
  for (int i = 0; i < Method::Input::count; ++i) size += Method::input_size(i, static_cast<int>(K));
  return size + (Method::square ? K * K : K);
}

// Doubles of a group's Workspace.
template <class Method>
int64_t workspace_size(int64_t K, bool masked) {
  return (masked ? packed_size<Method>(K) : 0) + Method::scratch_size(static_cast<int>(K));
}

// Elements of an input for n of the K tasks for which it has `size`.
MTLFAST_HD inline int64_t size_for(int64_t size, int64_t K, int64_t n) {
  return size == K * K ? n * n : size == K ? n : size;
}

// Makes of a problem what a mask leaves of it, copied to `memory`; returns where those tasks stand among the K: [n].
template <class Method, class Team>
MTLFAST_HD const int64_t* pack(const Team& team, Problem& p, const int* input_sizes, const bool* mask, double* memory) {
  const int K = p.num_tasks;
  static_assert(sizeof(int64_t) == sizeof(double) && sizeof(const double*) == sizeof(double));
  auto* places = reinterpret_cast<int64_t*>(memory);
  auto* tasks = places + K;
  auto** inputs = reinterpret_cast<const double**>(tasks + K);
  double* params = memory + 2 * K + Method::Input::count;
  double* gram = params + Method::Param::count;
  int n = 0;
  for (int k = 0; k < K; ++k) {
    if (!mask[k]) continue;
    if (team.rank == 0) places[n] = k, tasks[n] = p.task(k);
    ++n;
  }
  for (int i = team.rank; i < Method::Param::count; i += team.size) params[i] = p.params[i];
  team.sync();
  // A decision about ranks takes K times the precision of one product.
  if constexpr (requires { Method::Param::rtol; })
    if (team.rank == 0) params[Method::Param::rtol] *= static_cast<double>(n) / K;
  for (int i = team.rank; i < n * n; i += team.size) gram[i] = p.gram[places[i / n] * K + places[i % n]];
  double* next = gram + K * K;
  for (int i = 0; i < Method::Input::count; ++i) {
    const double* input = p.inputs[i];
    const int64_t size = input_sizes[i], kept = size_for(size, K, n);
    if (team.rank == 0) inputs[i] = input ? next : nullptr;
    for (int64_t j = team.rank; input && j < kept; j += team.size)
      next[j] = input[size == int64_t{K} * K ? places[j / n] * K + places[j % n] : size == K ? places[j] : j];
    next += size;
  }
  team.sync();
  if (team.rank == 0) {
    p.num_tasks = n;
    p.gram = gram;
    p.params = params;
    p.inputs = inputs;
    p.tasks = tasks;
    p.out = next;
  }
  return places;
}

// Writes out. A group that is not finite gets NaN for the tasks that have a part, and keeps its state.
//   input_sizes: [Input::count], elements of each input for the K tasks
//   mask: [K], which tasks have a part, or nullptr: all
//   p: the team's own, which is changed; its scratch is found here
template <class Method, class Team>
MTLFAST_HD void solve_group(const Team& team, Problem& p, const int* input_sizes, const bool* mask,
                            const Workspace& workspace) {
  const int K = p.num_tasks;
  double* const out = p.out;
  const int64_t* places = mask ? pack<Method>(team, p, input_sizes, mask, workspace.memory) : nullptr;
  if (team.rank == 0) p.scratch = workspace.scratch();
  team.sync();
  const int n = p.num_tasks, each = Method::square ? n * n : n, of_all = Method::square ? K * K : K;
  bool finite = true;
  for (int i = team.rank; i < n * n; i += team.size) finite = finite && std::isfinite(p.gram[i]);
  for (int i = 0; i < Method::Input::count; ++i) {
    const int64_t size = size_for(input_sizes[i], K, n);
    for (int64_t j = team.rank; p.inputs[i] && j < size; j += team.size)
      finite = finite && std::isfinite(p.inputs[i][j]);
  }
  if (team.any(!finite)) {
    for (int i = team.rank; i < each; i += team.size) p.out[i] = __builtin_nan("");
  } else if (n > 0) {
    Method::solve(team, p);
  }
  if (!mask) return;
  for (int i = team.rank; i < of_all; i += team.size) out[i] = 0;
  team.sync();
  for (int i = team.rank; i < each; i += team.size)
    out[Method::square ? places[i / n] * K + places[i % n] : places[i]] = p.out[i];
}

}  // namespace mtlfast::solvers

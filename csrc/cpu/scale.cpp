// g_k[c] *= factors[k] over a range of columns, in place: one read and one write of K rows.
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

template <class T>
void scale_row(T* row, int64_t n, typename Simd<T>::Scalar factor) {
  using S = Simd<T>;
  const auto step = [factor](T* p) {
    typename S::Vec v[S::kParts];
    for (int part = 0; part < S::kParts; ++part) v[part] = factor * S::load(p, part);
    S::store(p, v);
  };
  int64_t i = 0;
  for (; i + S::kStep <= n; i += S::kStep) step(row + i);
  if (i == n) return;
  T tail[S::kStep] = {};
  __builtin_memcpy(tail, row + i, (n - i) * sizeof(T));
  step(tail);
  __builtin_memcpy(row + i, tail, (n - i) * sizeof(T));
}

}  // namespace

void scale(const TaskView& grads, int64_t begin, int64_t end, const double* factors) {
  visit(grads.dtype, [&]<class T>(T) {
    for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t n) {
      for (int64_t k = 0; k < grads.num_tasks; ++k)
        if (const void* row = grads.tensor(t)[k])
          scale_row(static_cast<T*>(const_cast<void*>(row)) + first, n,
                    static_cast<typename Simd<T>::Scalar>(factors[k]));
    });
  });
}

}  // namespace mtlfast::MTLFAST_ISA

// out[k, c] = g_k[c] over a range of columns: the Jacobian as a matrix, one read and one write of K rows.
#include "kernels.h"
#include "pieces.h"

namespace mtlfast::MTLFAST_ISA {
namespace {

template <class T, class Out>
void copy_row(const T* from, int64_t n, Out* to) {
  for (int64_t i = 0; i < n; i += kStage) {
    const int64_t count = n - i < kStage ? n - i : kStage;
    WideOf<T, Out> wide[kStage];
    unpack_stage(from + i, count, wide);
    pack_stage(wide, count, to + i);
  }
}
template <class T>
void copy_row(const T* from, int64_t n, T* to) {
  __builtin_memcpy(to, from, n * sizeof(T));
}

}  // namespace

void flatten(const TaskView& grads, int64_t begin, int64_t end, DType out_dtype, int64_t row_stride, void* out) {
  visit(grads.dtype, [&]<class T>(T) {
    visit(out_dtype, [&]<class Out>(Out) {
      for_each_piece(grads, begin, end, [&](int64_t t, int64_t first, int64_t n) {
        for (int64_t k = 0; k < grads.num_tasks; ++k) {
          Out* to = static_cast<Out*>(out) + k * row_stride + grads.offsets[t] + first;
          if (const T* from = static_cast<const T*>(grads.tensor(t)[k]))
            copy_row(from + first, n, to);
          else
            __builtin_memset(to, 0, n * sizeof(Out));
        }
      });
    });
  });
}

}  // namespace mtlfast::MTLFAST_ISA

// gram, norms and gram_plain: dtypes to the instances of gram_<dtype>.cu.
#include "gram_launch.h"

namespace mtlfast::cuda {

MTLFAST_GRAM_OF(extern, float)
MTLFAST_GRAM_OF(extern, double)
MTLFAST_GRAM_OF(extern, __nv_bfloat16)
MTLFAST_GRAM_OF(extern, __half)
MTLFAST_EXACT_GRAM_OF(extern, float)
MTLFAST_EXACT_GRAM_OF(extern, __nv_bfloat16)
MTLFAST_EXACT_GRAM_OF(extern, __half)

namespace {

// use(T{}, Sum{}): the elements' type and that of their sums.
template <class Use>
auto visit_sums(DType dtype, bool exact, Use use) {
  return visit(dtype, [&]<class T>(T element) { return exact ? use(element, double{}) : use(element, Wide<T>{}); });
}

}  // namespace

int64_t gram_partials(const TaskView& grads, int64_t split, bool exact) {
  return visit_sums(grads.dtype, exact,
                    [&]<class T, class Sum>(T, Sum) { return gram_partials_of<T, Sum>(grads, split); });
}
int64_t norms_partials(const TaskView& grads) { return row_partials(grads); }

const char* gram(const TaskView& grads, int64_t split, bool exact, const Workspace& workspace, double* out,
                 void* stream) {
  return visit_sums(grads.dtype, exact,
                    [&]<class T, class Sum>(T, Sum) { return gram_of<T, Sum>(grads, split, workspace, out, stream); });
}
const char* norms(const TaskView& grads, const Workspace& workspace, double* out, void* stream) {
  return visit(grads.dtype, [&]<class T>(T) { return norms_of<T>(grads, workspace, out, stream); });
}
const char* gram_plain(const TaskView& grads, double* out, void* stream) {
  return visit(grads.dtype, [&]<class T>(T) { return gram_plain_of<T>(grads, out, stream); });
}

}  // namespace mtlfast::cuda

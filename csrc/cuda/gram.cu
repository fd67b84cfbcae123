// gram, norms and gram_plain: dtypes to the instances of gram_<dtype>.cu.
#include "gram_launch.h"

namespace mtlfast::cuda {

MTLFAST_GRAM_OF(extern, float)
MTLFAST_GRAM_OF(extern, double)
MTLFAST_GRAM_OF(extern, __nv_bfloat16)
MTLFAST_GRAM_OF(extern, __half)

int64_t gram_partials(const TaskView& grads, bool) {
  return visit(grads.dtype, [&]<class T>(T) { return gram_partials_of<T>(grads); });
}
int64_t norms_partials(const TaskView& grads) {
  const int64_t rows = grads.num_tasks < kNormsRows ? grads.num_tasks : kNormsRows;
  return rows * norms_blocks(grads, rows);
}

const char* gram(const TaskView& grads, bool exact, const Workspace& workspace, double* out, void* stream) {
  if (exact && grads.dtype != DType::Float64) return gram_plain(grads, out, stream);
  return visit(grads.dtype, [&]<class T>(T) { return gram_of<T>(grads, workspace, out, stream); });
}
const char* norms(const TaskView& grads, const Workspace& workspace, double* out, void* stream) {
  return visit(grads.dtype, [&]<class T>(T) { return norms_of<T>(grads, workspace, out, stream); });
}
const char* gram_plain(const TaskView& grads, double* out, void* stream) {
  return visit(grads.dtype, [&]<class T>(T) { return gram_plain_of<T>(grads, out, stream); });
}

}  // namespace mtlfast::cuda

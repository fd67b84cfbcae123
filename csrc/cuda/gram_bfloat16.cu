#include "gram_launch.h"

namespace mtlfast::cuda {
MTLFAST_GRAM_OF(, __nv_bfloat16)
MTLFAST_EXACT_GRAM_OF(, __nv_bfloat16)
}  // namespace mtlfast::cuda

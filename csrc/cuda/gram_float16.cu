#include "gram_launch.h"

namespace mtlfast::cuda {
MTLFAST_GRAM_OF(, __half)
MTLFAST_EXACT_GRAM_OF(, __half)
}  // namespace mtlfast::cuda

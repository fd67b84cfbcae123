#include "gram_launch.h"

namespace mtlfast::cuda {
MTLFAST_GRAM_OF(, float)
MTLFAST_EXACT_GRAM_OF(, float)
}  // namespace mtlfast::cuda

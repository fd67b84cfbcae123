#include "gram_launch.cuh"

namespace mtlfast::cuda {
MTLFAST_GRAM_OF(, float)
}

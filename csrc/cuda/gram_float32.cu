#include "gram_launch.h"

namespace mtlfast::cuda {
MTLFAST_GRAM_OF(, float)
}

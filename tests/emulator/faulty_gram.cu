// The real Gram kernels, of float32, with a fault compiled in by its macro.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

#ifdef FAULT_NO_BARRIER
#define __syncthreads() __threadfence()
#endif
#ifdef FAULT_SHUFFLE_MASK
#define __shfl_xor_sync(mask, value, lanes) __shfl_xor_sync(0x0fffffffu, value, lanes)
#endif
#ifdef FAULT_NO_WAIT
#define __pipeline_wait_prior(prior) __pipeline_wait_prior(8)
#endif
#include "cuda/gram_launch.h"

extern "C" [[gnu::visibility("default")]] const char* run_gram(const mtlfast::TaskView* grads, double* out,
                                                               uint64_t seed) {
  using namespace mtlfast::cuda;
  emulator::seed = seed;
  std::vector<double> partials(gram_partials_of<float, float>(*grads, 0));
  unsigned counter = 0;
  return gram_of<float, float>(*grads, 0, {partials.data(), &counter}, out, nullptr);
}

// A small kernel that uses what the real ones use, and the faults that the emulator must find: each is compiled in by
// its macro.
#include <cuda_pipeline_primitives.h>
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;

// out[i] = in[i] + in[the mirrored i of its block] + the sum of its warp, n elements, by four a thread.
__global__ void sums_kernel(const float* in, float* out, int n) {
  __shared__ __align__(16) float staged[kThreads * 4];
  const int thread = static_cast<int>(threadIdx.x), first = (static_cast<int>(blockIdx.x) * kThreads + thread) * 4;
  const uint4 zeros = make_uint4(0, 0, 0, 0);
  *reinterpret_cast<uint4*>(staged + thread * 4) = zeros;
  if (first + 4 <= n) {
#ifdef FAULT_MISALIGNED_LOAD
    *reinterpret_cast<uint4*>(staged + thread * 4) = *reinterpret_cast<const uint4*>(in + first + 1 - 2 * (thread % 2));
#elif defined(FAULT_NO_WAIT)
    __pipeline_memcpy_async(staged + thread * 4, in + first, 16);
#else
    *reinterpret_cast<uint4*>(staged + thread * 4) = *reinterpret_cast<const uint4*>(in + first);
#endif
  } else {
    for (int i = first; i < n; ++i) staged[i - first + thread * 4] = in[i];
  }
#ifndef FAULT_NO_BARRIER
  __syncthreads();
#endif
  float sum = staged[thread * 4];
#ifdef FAULT_SHUFFLE_MASK
  const unsigned mask = 0x7fffffffu;
#else
  const unsigned mask = 0xffffffffu;
#endif
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(mask, sum, lanes);
#ifdef FAULT_LOST_BARRIER
  if (thread != 17) __syncthreads();
#endif
#ifdef FAULT_STORE
  const int end = n + 1;
#else
  const int end = n;
#endif
  for (int i = first; i < first + 4 && i < end; ++i)
    out[i] = staged[i - first + thread * 4] + staged[kThreads * 4 - 1 - (i - first + thread * 4)] + sum;
}

}  // namespace

extern "C" [[gnu::visibility("default")]] const char* run_sums(const float* in, float* out, int n, uint64_t seed) {
  emulator::seed = seed;
  return emulator::launch<sums_kernel>(dim3((n + kThreads * 4 - 1) / (kThreads * 4)), kThreads, 0, nullptr, in, out, n);
}

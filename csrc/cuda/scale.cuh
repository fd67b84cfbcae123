// g_k[c] *= factors[k], in place: one read and one write of K * P elements.
//
// Thread to work: the present tensors of all tasks stand in one table, passed by value in the kernel's argument (no
// copy to the device, safe to capture). Every tensor is cut into chunks of kScaleChunk elements; block b takes chunks
// b, b + grid, ... and finds each one's tensor by binary search. Inside a chunk, thread i takes vectors i, i + 256, ...
// of the widest load that the tensor's address allows (16, 8, 4 or 2 bytes); what does not fill a vector is done one
// element a thread. Bytes moved: 2 * K * P * itemsize. Deterministic: each element is written once, by one product.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mtlfast::cuda {

constexpr int kScaleThreads = 256;
constexpr long long kScaleChunk = 16384;  // elements

struct ScaleEntry {
  void* data;
  long long numel;
  int task;
  int first_chunk;  // of this table's chunks
};
constexpr int kScaleCapacity = 1360;  // entries: 32,656 bytes, under the 32,764 that an argument may have

struct ScaleTable {
  int num_entries;
  int num_chunks;
  ScaleEntry entries[kScaleCapacity];
};
static_assert(sizeof(ScaleTable) <= 32764 - 16, "the table and one pointer fit a kernel argument");

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline void narrow(float v, float& out) { out = v; }
__device__ inline void narrow(double v, double& out) { out = v; }
__device__ inline void narrow(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }
__device__ inline void narrow(float v, __half& out) { out = __float2half_rn(v); }

template <class T, class Factor>
__device__ inline void scale_element(T* p, Factor factor) {
  narrow(widen(*p) * factor, *p);
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T element[2];
};

// n elements from p, whose address is a multiple of sizeof(Load).
template <class T, class Load, class Factor>
__device__ inline void scale_span(T* p, long long n, Factor factor) {
  constexpr int width = sizeof(Load) / sizeof(T);
  union Vector {
    Load load;
    T element[width];
    __device__ Vector() {}
  } v;
  Load* vectors = reinterpret_cast<Load*>(p);
  for (long long i = threadIdx.x; i < n / width; i += kScaleThreads) {
    v.load = vectors[i];
#pragma unroll
    for (int e = 0; e < width; ++e) scale_element(&v.element[e], factor);
    vectors[i] = v.load;
  }
  for (long long i = n / width * width + threadIdx.x; i < n; i += kScaleThreads) scale_element(p + i, factor);
}

template <class T, class Factor>
__global__ void __launch_bounds__(kScaleThreads)
    scale_kernel(const __grid_constant__ ScaleTable table, const double* __restrict__ factors) {
  for (int chunk = blockIdx.x; chunk < table.num_chunks; chunk += gridDim.x) {
    int low = 0, high = table.num_entries;  // first_chunk[low] <= chunk < first_chunk[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (table.entries[middle].first_chunk <= chunk)
        low = middle;
      else
        high = middle;
    }
    const ScaleEntry& entry = table.entries[low];
    const long long first = (chunk - entry.first_chunk) * kScaleChunk;
    const long long n = entry.numel - first < kScaleChunk ? entry.numel - first : kScaleChunk;
    T* p = static_cast<T*>(entry.data) + first;
    const Factor factor = static_cast<Factor>(factors[entry.task]);
    const unsigned long long address = reinterpret_cast<unsigned long long>(p);
    if (address % 16 == 0)
      scale_span<T, uint4>(p, n, factor);
    else if (address % 8 == 0)
      scale_span<T, uint2>(p, n, factor);
    else if (sizeof(T) < 4 && address % 4 == 0)
      scale_span<T, Pair<T>>(p, n, factor);
    else
      scale_span<T, T>(p, n, factor);
  }
}

}  // namespace mtlfast::cuda

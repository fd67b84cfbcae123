#include <cuda_runtime.h>

#include "launchers.h"
#include "scale.cuh"

namespace mtlfast::cuda {

namespace {

template <class T, class Factor>
cudaError_t launch(const ScaleTable& table, const double* factors, int processors, cudaStream_t stream) {
  if (table.num_chunks == 0) return cudaSuccess;
  const int grid = table.num_chunks < 8 * processors ? table.num_chunks : 8 * processors;
  scale_kernel<T, Factor><<<grid, kScaleThreads, 0, stream>>>(table, factors);
  return cudaGetLastError();
}

cudaError_t launch(DType dtype, const ScaleTable& table, const double* factors, int processors, cudaStream_t stream) {
  switch (dtype) {
    case DType::Float32:
      return launch<float, float>(table, factors, processors, stream);
    case DType::Float64:
      return launch<double, double>(table, factors, processors, stream);
    case DType::BFloat16:
      return launch<__nv_bfloat16, float>(table, factors, processors, stream);
    case DType::Float16:
      return launch<__half, float>(table, factors, processors, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* scale(const TaskView& grads, const double* factors, void* stream) {
  int device = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  constexpr long long kMostChunks = 1LL << 30;  // of one table: chunk numbers are ints
  ScaleTable table;
  table.num_entries = table.num_chunks = 0;
  const auto flush = [&] {
    error = launch(grads.dtype, table, factors, processors, static_cast<cudaStream_t>(stream));
    table.num_entries = table.num_chunks = 0;
  };
  for (int64_t t = 0; t < grads.num_tensors && error == cudaSuccess; ++t) {
    const long long numel = grads.offsets[t + 1] - grads.offsets[t], chunks = (numel + kScaleChunk - 1) / kScaleChunk;
    if (chunks > kMostChunks) return "a tensor has more than 2^44 elements";
    for (int64_t k = 0; k < grads.num_tasks && error == cudaSuccess; ++k) {
      void* data = const_cast<void*>(grads.tensor(t)[k]);
      if (!data || numel == 0) continue;
      if (table.num_entries == kScaleCapacity || table.num_chunks + chunks > kMostChunks) flush();
      table.entries[table.num_entries++] = {data, numel, static_cast<int>(k), table.num_chunks};
      table.num_chunks += static_cast<int>(chunks);
    }
  }
  if (error == cudaSuccess) flush();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mtlfast::cuda

// What launchers share: launching a kernel, choosing types by dtype, and the number of blocks for work without sums.
//
// The tests also compile the launchers with a host compiler, with a cuda_runtime.h that runs a launch on the CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"
#include "table.h"

namespace mtlfast::cuda {

#if defined(__CUDACC__)
// nullptr, or the error text.
template <auto kernel, class... Args>
const char* launch(dim3 grid, int block, int shared_bytes, void* stream, const Args&... args) {
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Returns nullptr if a kernel can run on the current device, or the error's name. To ask may load the kernel, which a
// capture allows in the relaxed mode only.
template <auto kernel>
const char* error_of() {
  cudaFuncAttributes attributes;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  const bool exchanged = cudaThreadExchangeStreamCaptureMode(&mode) == cudaSuccess;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (exchanged) cudaThreadExchangeStreamCaptureMode(&mode);
  cudaGetLastError();  // or the launch that follows would report it
  return error == cudaSuccess ? nullptr : cudaGetErrorName(error);
}

// Enough blocks to keep every processor of the current device busy with `chunks` chunks.
inline int blocks_to_fill(int chunks) {
  int device = 0, processors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    processors = 128;  // the launch itself will report the error
  return chunks < 8 * processors ? chunks : 8 * processors;
}
#else
using emulator::blocks_to_fill;
using emulator::error_of;
using emulator::launch;
#endif

// use(T{}) with the element type of `dtype`.
template <class Use>
auto visit(DType dtype, Use use) {
  switch (dtype) {
    case DType::Float64:
      return use(double{});
    case DType::BFloat16:
      return use(__nv_bfloat16{});
    case DType::Float16:
      return use(__half{});
    default:
      return use(float{});
  }
}

}  // namespace mtlfast::cuda

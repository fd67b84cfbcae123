#include <cuda_runtime.h>

#include "launchers.h"

namespace mtlfast::cuda {

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mtlfast::cuda

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <utility>

#include "launchers.h"

namespace mtlfast::cuda {

namespace {
constexpr int kMostStreams = 256;                        // of all devices
__device__ unsigned finished[kMostStreams * kCounters];  // zeros when the program is loaded, and after every op
}  // namespace

// Launches of one stream run one after another, so that they can share a counter. Those of a captured graph cannot,
// because it may be replayed on any stream; nor can those of the per-thread default streams, which share a handle. A
// stream is known by its id, because the handle of a destroyed stream may be given to a new one while launches of the
// old one still run.
unsigned* counter_of(void* stream) {
  static std::mutex mutex;
  static std::map<std::pair<int, unsigned long long>, int> slots;
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  int device = 0;
  void* counters = nullptr;
  if (stream == cudaStreamPerThread || cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status) ||
      status != cudaStreamCaptureStatusNone || cudaStreamGetId(static_cast<cudaStream_t>(stream), &id) ||
      cudaGetDevice(&device) || cudaGetSymbolAddress(&counters, finished)) {
    cudaGetLastError();  // otherwise the launch that follows would report it
    return nullptr;
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const int slot = slots.try_emplace({device, id}, static_cast<int>(slots.size())).first->second;
  return slot < kMostStreams ? static_cast<unsigned*>(counters) + slot * kCounters : nullptr;
}

int runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

int driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

const char* device_count(int* count) {
  *count = 0;
  const cudaError_t error = cudaGetDeviceCount(count);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace mtlfast::cuda

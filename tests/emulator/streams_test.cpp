// The counters of csrc/cuda/device.cu with a made-up CUDA runtime: which streams share one. No CUDA, no torch.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorUnknown };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
const cudaStream_t cudaStreamPerThread = reinterpret_cast<cudaStream_t>(2);

// What the tests set: the streams that there are, by handle; ids never come again.
static std::map<cudaStream_t, unsigned long long> ids;
static cudaStream_t capturing = nullptr;
static int current_device = 0;

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = capturing && stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  if (!ids.count(stream)) return cudaErrorUnknown;
  *id = ids[stream];
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  static T of_second_device;
  *address = current_device == 0 ? symbol : of_second_device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int*) { return cudaErrorUnknown; }
cudaError_t cudaDriverGetVersion(int*) { return cudaErrorUnknown; }
cudaError_t cudaGetDeviceCount(int*) { return cudaErrorUnknown; }
const char* cudaGetErrorString(cudaError_t) { return "unknown"; }

#include "cuda/device.cu"

using mtlfast::cuda::counter_of;

#define EXPECT(condition)                                                \
  if (!(condition)) {                                                    \
    std::printf("%s:%d: %s is false\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

static cudaStream_t handle(size_t number) { return reinterpret_cast<cudaStream_t>(number * 4096); }

int main() {
  unsigned long long next_id = 1;
  for (size_t i = 0; i < 3; ++i) ids[handle(i)] = next_id++;  // handle 0: the default stream
  unsigned* const first = counter_of(handle(1));
  EXPECT(first && *first == 0 && counter_of(handle(1)) == first);
  EXPECT(counter_of(handle(0)) && counter_of(handle(0)) != first);
  EXPECT(counter_of(handle(2)) != first && counter_of(handle(2)) != counter_of(handle(0)));

  current_device = 1;
  EXPECT(counter_of(handle(0)) && counter_of(handle(0)) != first);
  current_device = 0;

  ids[handle(1)] = next_id++;  // destroyed, and another stream created with its handle
  EXPECT(counter_of(handle(1)) && counter_of(handle(1)) != first);

  ids[cudaStreamPerThread] = next_id++;
  EXPECT(!counter_of(cudaStreamPerThread));
  capturing = handle(1);
  EXPECT(!counter_of(handle(1)) && counter_of(handle(2)));
  capturing = nullptr;
  EXPECT(!counter_of(handle(1000)));  // the runtime refuses it

  std::set<unsigned*> counters;
  int without = 0;
  for (size_t i = 3; i < 303; ++i) {
    ids[handle(i)] = next_id++;
    unsigned* const counter = counter_of(handle(i));
    EXPECT(!counter || counters.insert(counter).second);
    without += !counter;
  }
  EXPECT(counters.size() == 251 && without == 49);  // of 256, five were taken above
  std::puts("ok");
}

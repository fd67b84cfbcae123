// What the glue needs of a GPU, without a CUDA header: it makes a device current and finds the current stream.
#pragma once
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include "cuda/launchers.h"

namespace mtlfast {

#ifdef MTLFAST_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

// Calls launch(stream) with `device` current, and raises the error text that it returns, if any.
template <class Launch>
void on_gpu(const char* op, at::Device device, Launch launch) {
  if constexpr (kWithCuda) {
    const c10::DeviceGuard guard(device);
    void* stream = c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
    const char* error = launch(stream);
    TORCH_CHECK(!error, op, ": CUDA launch failed: ", error);
  } else {
    TORCH_CHECK(false, op, ": this build of mtlfast holds no CUDA kernels");
  }
}

}  // namespace mtlfast

// Registers an implementation that serves both devices.
#ifdef MTLFAST_WITH_CUDA
#define MTLFAST_IMPL(m)                                         \
  static void register_kernels(torch::Library& m);              \
  TORCH_LIBRARY_IMPL(mtlfast, CPU, m) { register_kernels(m); }  \
  TORCH_LIBRARY_IMPL(mtlfast, CUDA, m) { register_kernels(m); } \
  static void register_kernels(torch::Library& m)
#else
#define MTLFAST_IMPL(m) TORCH_LIBRARY_IMPL(mtlfast, CPU, m)
#endif

// What the glue calls on a GPU. No torch header; no CUDA header either: a stream is passed as the pointer that it is.
#pragma once
#include "../kernels.h"

namespace mtlfast::cuda {

// Each returns nullptr, or the CUDA error's text. Pointers in the view and `factors` lie on the current device.
const char* scale(const TaskView& grads, const double* factors, void* stream);

// Facts for `python -m mtlfast info`.
int runtime_version();                 // 13000 = CUDA 13.0
const char* device_count(int* count);  // nullptr, or why no device can be used

}  // namespace mtlfast::cuda

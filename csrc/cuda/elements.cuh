// Elements in registers: conversions, and loads and stores as wide as an address allows.
//
// A group is the 16 / sizeof(T) consecutive elements that one thread takes at a time. The width of its loads depends on
// addresses, but which elements it holds does not. So sums are bitwise the same wherever the allocator put the tensors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace mtlfast::cuda {

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }

// The shared memory whose size is an argument of the launch.
#if defined(__CUDACC__)
__device__ inline void* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}
#else
using emulator::dynamic_shared;
#endif

// The type in which elements of a dtype are computed.
template <class T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <class T>
using Wide = typename WideOf<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }
template <class Sum, class T>
__device__ inline Sum widen_to(T v) {
  return static_cast<Sum>(widen(v));
}

// Rounds to nearest even. A double is rounded to 16 bits by way of float, as in torch.
template <class W>
__device__ inline void narrow(W v, float& out) {
  out = static_cast<float>(v);
}
template <class W>
__device__ inline void narrow(W v, double& out) {
  out = v;
}
template <class W>
__device__ inline void narrow(W v, __nv_bfloat16& out) {
  out = __float2bfloat16_rn(static_cast<float>(v));
}
template <class W>
__device__ inline void narrow(W v, __half& out) {
  out = __float2half_rn(static_cast<float>(v));
}

template <class T>
constexpr int kGroup = 16 / sizeof(T);  // elements

// N elements as one to N machine words.
template <class T, int N = kGroup<T>>
union Group {
  static constexpr int kBytes = N * sizeof(T);
  uint4 by16[kBytes < 16 ? 1 : kBytes / 16];
  uint2 by8[kBytes < 8 ? 1 : kBytes / 8];
  unsigned by4[kBytes / 4];
  unsigned short by2[kBytes / 2];
  T element[N];
  __device__ Group() {}
};

template <class T, int N>
__device__ inline void clear(Group<T, N>& group) {
#pragma unroll
  for (int i = 0; i < Group<T, N>::kBytes / 4; ++i) group.by4[i] = 0;
}

// Copies a group between registers and memory in accesses of Word: words is one of the group's arrays.
template <class Word, int N>
__device__ inline void load_words(const void* from, Word (&words)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) words[i] = static_cast<const Word*>(from)[i];
}
template <class Word, int N>
__device__ inline void store_words(void* to, const Word (&words)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) static_cast<Word*>(to)[i] = words[i];
}

// Loads the first `left` elements of N groups. The elements behind them, and all where a pointer is nullptr, are zeros.
// `bytes` is the widest access that all addresses allow. One branch serves all groups, so that their loads are in
// flight together.
template <class T, int N>
__device__ inline void load_groups(const T* const (&from)[N], int left, int bytes, Group<T> (&groups)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) clear(groups[i]);
  if (left >= kGroup<T> && bytes == 16) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (from[i]) load_words(from[i], groups[i].by16);
  } else if (left >= kGroup<T> && bytes == 8 && sizeof(T) < 8) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (from[i]) load_words(from[i], groups[i].by8);
  } else if (left >= kGroup<T> && bytes == 4 && sizeof(T) < 4) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (from[i]) load_words(from[i], groups[i].by4);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < kGroup<T>; ++e)
        if (from[i] && e < left) groups[i].element[e] = from[i][e];
  }
}

// Stores the first `left` elements of a group, in accesses of at most `bytes`.
template <class T, int N>
__device__ inline void store_group(const Group<T, N>& group, T* to, int left, int bytes) {
  constexpr int size = Group<T, N>::kBytes;
  if (left >= N && bytes == 16 && size >= 16) {
    store_words(to, group.by16);
  } else if (left >= N && bytes >= 8 && sizeof(T) < 8 && size >= 8) {
    store_words(to, group.by8);
  } else if (left >= N && bytes >= 4 && sizeof(T) < 4) {
    store_words(to, group.by4);
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e)
      if (e < left) to[e] = group.element[e];
  }
}

}  // namespace mtlfast::cuda

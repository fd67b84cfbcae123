// Elements in registers: conversions, and loads and stores as wide as an address allows.
//
// A group is the 16 / sizeof(T) consecutive elements that one thread takes at a time. The width of its loads depends on
// addresses, but which elements it holds does not. So sums are bitwise the same wherever the allocator put the tensors.
// No access touches anything beside the elements.
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

// 2 N elements of 16 bits, N > 1, at any multiple of 2 bytes, in N + 1 accesses: N - 1 aligned words, the element
// before these, and the one that is left over. That is the last where the address is odd (no multiple of 4), else the
// first.
template <int N>
struct Shifted {
  unsigned middle[N - 1], before = 0, left = 0;

  __device__ Shifted() {
#pragma unroll
    for (int i = 0; i < N - 1; ++i) middle[i] = 0;
  }
  __device__ static bool odd(const void* address) { return reinterpret_cast<unsigned long long>(address) % 4 != 0; }
  __device__ static int first_word(bool odd) { return odd ? 1 : 2; }  // at which element
  __device__ static int left_over(bool odd) { return odd ? 2 * N - 1 : 0; }

  __device__ void load(const void* from) {
    const unsigned short* elements = static_cast<const unsigned short*>(from);
    const unsigned short* words = elements + first_word(odd(from));
    load_words(words, middle);
    before = words[-1];
    left = elements[left_over(odd(from))];
  }
  // What was loaded from there, as the N words that an aligned load gives.
  __device__ void shift(const void* from, unsigned (&words)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const unsigned low = i == 0 ? before << 16 : middle[i - 1], high = i == N - 1 ? left : middle[i];
      words[i] = odd(from) ? low >> 16 | high << 16 : i == 0 ? left | low : low;
    }
  }
  __device__ static void store(const unsigned (&words)[N], void* to) {
    unsigned short* elements = static_cast<unsigned short*>(to);
    unsigned short* places = elements + first_word(odd(to));
    unsigned middle[N - 1];
#pragma unroll
    for (int i = 0; i < N - 1; ++i) middle[i] = odd(to) ? words[i] >> 16 | words[i + 1] << 16 : words[i + 1];
    store_words(places, middle);
    places[-1] = static_cast<unsigned short>(odd(to) ? words[0] : words[0] >> 16);
    elements[left_over(odd(to))] = static_cast<unsigned short>(odd(to) ? words[N - 1] >> 16 : words[0]);
  }
};

// Loads of N groups, some at a time in flight: each takes five registers.
constexpr int kShiftedAtOnce = 4;
template <class T, int Size, int N>
__device__ inline void load_shifted(const T* const (&from)[N], Group<T, Size> (&groups)[N]) {
#pragma unroll
  for (int first = 0; first < N; first += kShiftedAtOnce) {
    Shifted<Group<T, Size>::kBytes / 4> loaded[kShiftedAtOnce];
#pragma unroll
    for (int i = 0; i < kShiftedAtOnce; ++i)
      if (first + i < N && from[first + i]) loaded[i].load(from[first + i]);
#pragma unroll
    for (int i = 0; i < kShiftedAtOnce; ++i)
      if (first + i < N) loaded[i].shift(from[first + i], groups[first + i].by4);
  }
}

// Loads the first `left` elements of N groups of Size. The elements behind them, and all where a pointer is nullptr,
// are zeros. `bytes` is the widest access that all addresses allow. One branch serves all groups, so that their loads
// are in flight together.
template <class T, int Size, int N>
__device__ inline void load_groups(const T* const (&from)[N], int left, int bytes, Group<T, Size> (&groups)[N]) {
  constexpr int size = Group<T, Size>::kBytes;
#pragma unroll
  for (int i = 0; i < N; ++i) clear(groups[i]);
  if (left >= Size && bytes == 16 && size >= 16) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (from[i]) load_words(from[i], groups[i].by16);
  } else if (left >= Size && bytes >= 8 && sizeof(T) < 8 && size >= 8) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (from[i]) load_words(from[i], groups[i].by8);
  } else if (left >= Size && bytes >= 4 && sizeof(T) < 4) {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (from[i]) load_words(from[i], groups[i].by4);
  } else if (left >= Size && sizeof(T) < 4 && size > 4) {
    if constexpr (sizeof(T) < 4 && size > 4) load_shifted(from, groups);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
#pragma unroll
      for (int e = 0; e < Size; ++e)
        if (from[i] && e < left) groups[i].element[e] = from[i][e];
  }
}

// Stores the first `left` elements of a group, in accesses of at most `bytes`.
template <class T, int Size>
__device__ inline void store_group(const Group<T, Size>& group, T* to, int left, int bytes) {
  constexpr int size = Group<T, Size>::kBytes;
  if (left >= Size && bytes == 16 && size >= 16) {
    store_words(to, group.by16);
  } else if (left >= Size && bytes >= 8 && sizeof(T) < 8 && size >= 8) {
    store_words(to, group.by8);
  } else if (left >= Size && bytes >= 4 && sizeof(T) < 4) {
    store_words(to, group.by4);
  } else if (left >= Size && sizeof(T) < 4 && size > 4) {
    if constexpr (sizeof(T) < 4 && size > 4) Shifted<size / 4>::store(group.by4, to);
  } else {
#pragma unroll
    for (int e = 0; e < Size; ++e)
      if (e < left) to[e] = group.element[e];
  }
}

}  // namespace mtlfast::cuda

// kLanes elements as doubles in their order in memory, in two vectors: for work on rows of several dtypes at once,
// which the interleaved parts of Simd<T> do not allow.
#pragma once
#include "simd.h"

namespace mtlfast::MTLFAST_ISA {

typedef uint16_t U16 __attribute__((vector_size(MTLFAST_VECTOR_BYTES / 2)));

MTLFAST_INLINE F32 load_floats(const float* p) { return load_unaligned<F32>(p); }
MTLFAST_INLINE void store_floats(float* p, F32 v) { store_unaligned(p, v); }

MTLFAST_INLINE U32 load_bits(const void* p) { return __builtin_convertvector(load_unaligned<U16>(p), U32); }
MTLFAST_INLINE void store_bits(void* p, U32 bits) { store_unaligned(p, __builtin_convertvector(bits, U16)); }

MTLFAST_INLINE F32 load_floats(const BFloat16* p) { return (F32)(load_bits(p) << 16); }
MTLFAST_INLINE void store_floats(BFloat16* p, F32 v) { store_bits(p, bfloat16_bits(v) >> 16); }

#if defined(__F16C__)
MTLFAST_INLINE F32 load_floats(const Float16* p) { return Simd<Float16>::load(p, 0); }
MTLFAST_INLINE void store_floats(Float16* p, F32 v) {
#if MTLFAST_VECTOR_BYTES == 64
  store_unaligned(p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#else
  store_unaligned(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
}
#else
MTLFAST_INLINE F32 load_floats(const Float16* p) { return half_to_float(load_bits(p)); }
MTLFAST_INLINE void store_floats(Float16* p, F32 v) { store_bits(p, float_to_half(v)); }
#endif

// The elements i .. i + kLanes of a row.
template <class T>
MTLFAST_INLINE void load_in_order(const T* row, int64_t i, F64 (&v)[2]) {
  const F32 floats = load_floats(row + i);
  v[0] = to_double(low_half(floats));
  v[1] = to_double(high_half(floats));
}
template <class T>
MTLFAST_INLINE void store_in_order(T* row, int64_t i, const F64 (&v)[2]) {
  store_floats(row + i, join(to_float(v[0]), to_float(v[1])));
}
MTLFAST_INLINE void load_in_order(const double* row, int64_t i, F64 (&v)[2]) {
  v[0] = load_unaligned<F64>(row + i);
  v[1] = load_unaligned<F64>(row + i + kLanes / 2);
}
MTLFAST_INLINE void store_in_order(double* row, int64_t i, const F64 (&v)[2]) {
  store_unaligned(row + i, v[0]);
  store_unaligned(row + i + kLanes / 2, v[1]);
}

// The elements i .. i + n of a row, n < kLanes, padded with zeros.
template <class T>
struct Tail {
  T elements[kLanes] = {};
  MTLFAST_INLINE Tail(const T* row, int64_t i, int64_t n) { __builtin_memcpy(elements, row + i, n * sizeof(T)); }
  MTLFAST_INLINE void store(T* row, int64_t i, int64_t n) const { __builtin_memcpy(row + i, elements, n * sizeof(T)); }
};

// Stands for the type of a row that is absent: its elements are zeros, and nothing is loaded or stored.
struct Absent {};
template <class T>
constexpr bool kPresent = true;
template <>
inline constexpr bool kPresent<Absent> = false;
MTLFAST_INLINE void load_in_order(const Absent*, int64_t, F64 (&v)[2]) { v[0] = v[1] = F64{}; }
MTLFAST_INLINE void store_in_order(Absent*, int64_t, const F64 (&)[2]) {}
template <>
struct Tail<Absent> {
  Absent elements[1];
  MTLFAST_INLINE Tail(const Absent*, int64_t, int64_t) {}
  MTLFAST_INLINE void store(Absent*, int64_t, int64_t) const {}
};

}  // namespace mtlfast::MTLFAST_ISA

// Vectors of one instruction set, in the compiler's vector extension, so that one source serves all instruction sets.
// A unit is the kernels compiled for one instruction set, with its own flags, MTLFAST_ISA (namespace and name) and
// MTLFAST_VECTOR_BYTES. No header with inline functions is included here: the linker keeps one copy of such a function,
// and that may use instructions which another machine lacks.
#pragma once
#include <cstdint>

#include "../kernels.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace mtlfast::MTLFAST_ISA {

#define MTLFAST_INLINE inline __attribute__((always_inline))

constexpr int kLanes = MTLFAST_VECTOR_BYTES / 4;
typedef float F32 __attribute__((vector_size(MTLFAST_VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(MTLFAST_VECTOR_BYTES)));
typedef double F64 __attribute__((vector_size(MTLFAST_VECTOR_BYTES)));
typedef float HalfF32 __attribute__((vector_size(MTLFAST_VECTOR_BYTES / 2)));

template <class V>
MTLFAST_INLINE V load_unaligned(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
MTLFAST_INLINE void store_unaligned(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

#if !__has_builtin(__builtin_shufflevector)  // g++ 11
MTLFAST_INLINE HalfF32 low_half(F32 v) { return load_unaligned<HalfF32>(&v); }
MTLFAST_INLINE HalfF32 high_half(F32 v) {
  return load_unaligned<HalfF32>(reinterpret_cast<const char*>(&v) + sizeof(HalfF32));
}
MTLFAST_INLINE F32 join(HalfF32 low, HalfF32 high) {
  const HalfF32 halves[2] = {low, high};
  return load_unaligned<F32>(halves);
}
#elif MTLFAST_VECTOR_BYTES == 16
MTLFAST_INLINE HalfF32 low_half(F32 v) { return __builtin_shufflevector(v, v, 0, 1); }
MTLFAST_INLINE HalfF32 high_half(F32 v) { return __builtin_shufflevector(v, v, 2, 3); }
MTLFAST_INLINE F32 join(HalfF32 low, HalfF32 high) { return __builtin_shufflevector(low, high, 0, 1, 2, 3); }
#elif MTLFAST_VECTOR_BYTES == 32
MTLFAST_INLINE HalfF32 low_half(F32 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3); }
MTLFAST_INLINE HalfF32 high_half(F32 v) { return __builtin_shufflevector(v, v, 4, 5, 6, 7); }
MTLFAST_INLINE F32 join(HalfF32 low, HalfF32 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
#else
MTLFAST_INLINE HalfF32 low_half(F32 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
MTLFAST_INLINE HalfF32 high_half(F32 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
MTLFAST_INLINE F32 join(HalfF32 low, HalfF32 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif
MTLFAST_INLINE F64 to_double(HalfF32 v) {  // gcc makes several instructions of the generic conversion
#if MTLFAST_VECTOR_BYTES == 64
  return (F64)_mm512_maskz_cvtps_pd(0xff, (__m256)v);
#elif defined(__F16C__)
  return (F64)_mm256_cvtps_pd((__m128)v);
#else
  return __builtin_convertvector(v, F64);
#endif
}
MTLFAST_INLINE HalfF32 to_float(F64 v) {
#if MTLFAST_VECTOR_BYTES == 64
  return (HalfF32)_mm512_maskz_cvtpd_ps(0xff, (__m512d)v);
#elif defined(__F16C__)
  return (HalfF32)_mm256_cvtpd_ps((__m256d)v);
#else
  return __builtin_convertvector(v, HalfF32);
#endif
}

// Adds the two halves of the lanes in float, and returns the sums as doubles: half the work, one more rounding.
MTLFAST_INLINE F64 fold_to_double(F32 v) { return to_double(low_half(v) + high_half(v)); }
MTLFAST_INLINE F64 fold_to_double(F64 v) { return v; }

MTLFAST_INLINE U32 bfloat16_bits(F32 v) {  // round to nearest even, in the upper half; NaN stays NaN
  const U32 bits = (U32)v;
  const U32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return (v == v ? rounded : (bits | 0x400000u)) & 0xffff0000u;
}

// kParts vectors of `Vec` make one step of kStep elements. A vector holds consecutive elements, or every other one
// (kInterleaved). Store reverses load, so that sums and element-wise work need not know. Element is the type in memory.
template <class T>
struct Simd;

template <>
struct Simd<float> {
  using Element = float;
  using Vec = F32;
  using Scalar = float;
  static constexpr int kParts = 1, kStep = kLanes;
  static constexpr bool kInterleaved = false;
  static MTLFAST_INLINE Vec load(const float* p, int) { return load_unaligned<F32>(p); }
  static MTLFAST_INLINE void store(float* p, const Vec* v) { store_unaligned(p, v[0]); }
};

template <>
struct Simd<double> {
  using Element = double;
  using Vec = F64;
  using Scalar = double;
  static constexpr int kParts = 1, kStep = kLanes / 2;
  static constexpr bool kInterleaved = false;
  static MTLFAST_INLINE Vec load(const double* p, int) { return load_unaligned<F64>(p); }
  static MTLFAST_INLINE void store(double* p, const Vec* v) { store_unaligned(p, v[0]); }
};

template <>
struct Simd<BFloat16> {  // part 0: even elements, by a shift; part 1: odd ones, by a mask
  using Element = BFloat16;
  using Vec = F32;
  using Scalar = float;
  static constexpr int kParts = 2, kStep = 2 * kLanes;
  static constexpr bool kInterleaved = true;
  static MTLFAST_INLINE Vec load(const BFloat16* p, int part) {
    const U32 raw = load_unaligned<U32>(p);
    return (F32)(part == 0 ? raw << 16 : raw & 0xffff0000u);
  }
  static MTLFAST_INLINE void store(BFloat16* p, const Vec* v) {
    store_unaligned(p, bfloat16_bits(v[1]) | (bfloat16_bits(v[0]) >> 16));
  }
};

#if defined(__F16C__)
#if MTLFAST_VECTOR_BYTES == 64
MTLFAST_INLINE __m256i half_bits(F32 v) { return _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#else
MTLFAST_INLINE __m128i half_bits(F32 v) { return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#endif
template <>
struct Simd<Float16> {  // part 0: the first kLanes elements; part 1: the next
  using Element = Float16;
  using Vec = F32;
  using Scalar = float;
  static constexpr int kParts = 2, kStep = 2 * kLanes;
  static constexpr bool kInterleaved = false;
  static MTLFAST_INLINE Vec load(const Float16* p, int part) {
#if MTLFAST_VECTOR_BYTES == 64
    return (F32)_mm512_maskz_cvtph_ps(0xffff, load_unaligned<__m256i>(p + part * kLanes));
#else
    return (F32)_mm256_cvtph_ps(load_unaligned<__m128i>(p + part * kLanes));
#endif
  }
  static MTLFAST_INLINE void store(Float16* p, const Vec* v) {
    for (int part = 0; part < kParts; ++part) store_unaligned(p + part * kLanes, half_bits(v[part]));
  }
};
#else
// Without a conversion instruction it uses integer arithmetic, like torch's c10::Half.
MTLFAST_INLINE F32 half_to_float(U32 h) {
  const U32 sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  const F32 two_to_112 = (F32)(U32{} + 0x77800000u);
  const F32 scaled = (F32)(magnitude << 13) * two_to_112;
  const U32 bits = magnitude >= 0x7c00u ? (U32)scaled | 0x7f800000u : (U32)scaled;
  return (F32)(bits | sign);
}
MTLFAST_INLINE U32 float_to_half(F32 v) {
  const U32 bits = (U32)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // A normal half is rebiased and rounded as an integer. For a subnormal one, adding 0.5 aligns the bits and rounds.
  const U32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32 subnormal = (U32)((F32)magnitude + 0.5f) - 0x3f000000u;
  const U32 finite = magnitude < 0x38800000u ? subnormal : normal;
  const U32 infinite = magnitude > 0x7f800000u ? U32{} + 0x7e00u : U32{} + 0x7c00u;
  return (magnitude >= 0x477ff000u ? infinite : finite) | sign;
}

template <>
struct Simd<Float16> {  // part 0: even elements; part 1: odd ones
  using Element = Float16;
  using Vec = F32;
  using Scalar = float;
  static constexpr int kParts = 2, kStep = 2 * kLanes;
  static constexpr bool kInterleaved = true;
  static MTLFAST_INLINE Vec load(const Float16* p, int part) {
    const U32 raw = load_unaligned<U32>(p);
    return half_to_float(part == 0 ? raw & 0xffffu : raw >> 16);
  }
  static MTLFAST_INLINE void store(Float16* p, const Vec* v) {
    store_unaligned(p, float_to_half(v[0]) | (float_to_half(v[1]) << 16));
  }
};
#endif

// Loads and stores like Simd<T>, and converts to and from double, which takes twice as many parts.
template <class T>
struct Widened {
  using Element = T;
  using Vec = F64;
  static constexpr int kParts = 2 * Simd<T>::kParts, kStep = Simd<T>::kStep;
  static MTLFAST_INLINE Vec load(const T* p, int part) {
    const F32 v = Simd<T>::load(p, part / 2);
    return to_double(part % 2 == 0 ? low_half(v) : high_half(v));
  }
  static MTLFAST_INLINE void store(T* p, const Vec* v) {
    F32 rounded[Simd<T>::kParts];
    for (int part = 0; part < Simd<T>::kParts; ++part)
      rounded[part] = join(to_float(v[2 * part]), to_float(v[2 * part + 1]));
    Simd<T>::store(p, rounded);
  }
};
template <>
struct Widened<float> {
  using Element = float;
  using Vec = F64;
  static constexpr int kParts = 1, kStep = kLanes / 2;
  static MTLFAST_INLINE Vec load(const float* p, int) { return to_double(load_unaligned<HalfF32>(p)); }
  static MTLFAST_INLINE void store(float* p, const Vec* v) { store_unaligned(p, to_float(v[0])); }
};
template <>
struct Widened<double> : Simd<double> {};

// A vector of kStep consecutive elements, in the type in which they are computed: float for the 16-bit formats. The
// elements keep their order, so that a vector of another array can be met with them.
template <class T>
struct InOrder;
typedef uint16_t HalfU16 __attribute__((vector_size(MTLFAST_VECTOR_BYTES / 2)));  // kLanes of them

template <>
struct InOrder<float> {
  using Vec = F32;
  static constexpr int kStep = kLanes;
  static MTLFAST_INLINE Vec load(const float* p) { return load_unaligned<F32>(p); }
  static MTLFAST_INLINE void store(float* p, Vec v) { store_unaligned(p, v); }
};
template <>
struct InOrder<double> {
  using Vec = F64;
  static constexpr int kStep = kLanes / 2;
  static MTLFAST_INLINE Vec load(const double* p) { return load_unaligned<F64>(p); }
  static MTLFAST_INLINE void store(double* p, Vec v) { store_unaligned(p, v); }
};
template <>
struct InOrder<BFloat16> {
  using Vec = F32;
  static constexpr int kStep = kLanes;
  static MTLFAST_INLINE Vec load(const BFloat16* p) {
    return (F32)(__builtin_convertvector(load_unaligned<HalfU16>(p), U32) << 16);
  }
  static MTLFAST_INLINE void store(BFloat16* p, Vec v) {
    store_unaligned(p, __builtin_convertvector(bfloat16_bits(v) >> 16, HalfU16));
  }
};
template <>
struct InOrder<Float16> {
  using Vec = F32;
  static constexpr int kStep = kLanes;
#if defined(__F16C__)
  static MTLFAST_INLINE Vec load(const Float16* p) { return Simd<Float16>::load(p, 0); }
  static MTLFAST_INLINE void store(Float16* p, Vec v) { store_unaligned(p, half_bits(v)); }
#else
  static MTLFAST_INLINE Vec load(const Float16* p) {
    return half_to_float(__builtin_convertvector(load_unaligned<HalfU16>(p), U32));
  }
  static MTLFAST_INLINE void store(Float16* p, Vec v) {
    store_unaligned(p, __builtin_convertvector(float_to_half(v), HalfU16));
  }
#endif
};

// A vector in order as kWides<Vec> vectors of doubles, and back.
template <class Vec>
constexpr int kWides = 2;
template <>
constexpr int kWides<F64> = 1;
MTLFAST_INLINE F64 widened(F32 v, int i) { return to_double(i == 0 ? low_half(v) : high_half(v)); }
MTLFAST_INLINE F64 widened(F64 v, int) { return v; }
MTLFAST_INLINE F32 narrowed(const F64 (&v)[2]) { return join(to_float(v[0]), to_float(v[1])); }
MTLFAST_INLINE F64 narrowed(const F64 (&v)[1]) { return v[0]; }

// Copies n elements, a multiple of the step, to and from arrays of float or double in their order.
template <class T, class Wide>
MTLFAST_INLINE void unpack(const T* from, int64_t n, Wide* to) {
  using S = Simd<T>;
  constexpr int lanes = S::kStep / S::kParts, apart = S::kInterleaved ? S::kParts : 1;
  for (int64_t c = 0; c < n; c += S::kStep)
    for (int part = 0; part < S::kParts; ++part) {
      const typename S::Vec v = S::load(from + c, part);
      for (int lane = 0; lane < lanes; ++lane)
        to[c + (S::kInterleaved ? part : part * lanes) + lane * apart] = static_cast<Wide>(v[lane]);
    }
}
template <class T, class Wide>
MTLFAST_INLINE void pack(const Wide* from, int64_t n, T* to) {
  using S = Simd<T>;
  constexpr int lanes = S::kStep / S::kParts, apart = S::kInterleaved ? S::kParts : 1;
  for (int64_t c = 0; c < n; c += S::kStep) {
    typename S::Vec v[S::kParts];
    for (int part = 0; part < S::kParts; ++part) {
      typename S::Scalar values[lanes];
      for (int lane = 0; lane < lanes; ++lane)
        values[lane] =
            static_cast<typename S::Scalar>(from[c + (S::kInterleaved ? part : part * lanes) + lane * apart]);
      v[part] = load_unaligned<typename S::Vec>(values);
    }
    S::store(to + c, v);
  }
}

// The same for any n <= kStage elements. It fills all kStage of `wide`, so that computations on it have no tail.
constexpr int64_t kStage = 64;  // a multiple of every step
template <class T, class Wide>
MTLFAST_INLINE void unpack_stage(const T* from, int64_t n, Wide* wide) {
  T padded[kStage] = {};
  __builtin_memcpy(padded, from, n * sizeof(T));
  unpack(padded, kStage, wide);
}
template <class T, class Wide>
MTLFAST_INLINE void pack_stage(const Wide* wide, int64_t n, T* to) {
  T padded[kStage];
  pack(wide, kStage, padded);
  __builtin_memcpy(to, padded, n * sizeof(T));
}

// The type in which elements of the two types are computed: float, or double if either is double.
template <class A, class B>
using WideOf = decltype(typename Simd<A>::Scalar{} + typename Simd<B>::Scalar{});

// Calls use(T{}) with the element type of `dtype`.
template <class Use>
MTLFAST_INLINE void visit(DType dtype, Use use) {
  switch (dtype) {
    case DType::Float32:
      return use(float{});
    case DType::Float64:
      return use(double{});
    case DType::BFloat16:
      return use(BFloat16{});
    case DType::Float16:
      return use(Float16{});
  }
}

}  // namespace mtlfast::MTLFAST_ISA

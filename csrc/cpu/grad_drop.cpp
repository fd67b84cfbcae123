// GradDrop: keeps the gradients of one sign, chosen at random by the sign purity. One read of the K rows, one write.
//
// A vector of each row is loaded in turn and added to the sums of positive and of negative gradients. Then p > u is
// decided as s > u (s - r), for s of the positive and r of the negative ones, so that nothing is divided and where all
// gradients are 0 both sums are 0. The random numbers of a block are made before it, four for each counter.
//
// Sums are double for every dtype, run over the tasks in ascending order, and are rounded once to the output. With
// round_each every operation is rounded to the gradients' type, float or double, in the order of torch's own ops: sums
// of 16 tasks are added to each other. An element with a gradient that is not finite becomes NaN: the difference of its
// sum s - r with itself is added. So results are deterministic, and u depends on the seed and the column alone.
#include "kernels.h"
#include "rows.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace mtlfast::MTLFAST_ISA {
namespace {

typedef uint64_t U64 __attribute__((vector_size(MTLFAST_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(MTLFAST_VECTOR_BYTES)));
typedef int32_t HalfI32 __attribute__((vector_size(MTLFAST_VECTOR_BYTES / 2)));
constexpr int kCounters = MTLFAST_VECTOR_BYTES / 8;  // side by side

// The products of the lower halves of the 64-bit lanes.
MTLFAST_INLINE U64 multiply_low(U64 a, U64 b) {
#if MTLFAST_VECTOR_BYTES == 64
  return (U64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif MTLFAST_VECTOR_BYTES == 32
  return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Stores the lanes a0 b0 a2 b2 ... a1 b1 a3 b3 ...
MTLFAST_INLINE void store_alternating(uint64_t* to, U64 a, U64 b) {
#if MTLFAST_VECTOR_BYTES == 64
  store_unaligned(to, _mm512_maskz_unpacklo_epi64(0xff, (__m512i)a, (__m512i)b));
  store_unaligned(to + kCounters, _mm512_maskz_unpackhi_epi64(0xff, (__m512i)a, (__m512i)b));
#elif MTLFAST_VECTOR_BYTES == 32
  store_unaligned(to, _mm256_unpacklo_epi64((__m256i)a, (__m256i)b));
  store_unaligned(to + kCounters, _mm256_unpackhi_epi64((__m256i)a, (__m256i)b));
#else
  const uint64_t lanes[4] = {a[0], b[0], a[1], b[1]};
  __builtin_memcpy(to, lanes, sizeof(lanes));
#endif
}

// The random words of the counters first .. first + kCounters, four of each.
MTLFAST_INLINE void random_words(uint64_t seed, uint64_t first, uint32_t* to) {
  U64 counter = {};
  for (int lane = 0; lane < kCounters; ++lane)  // as store_alternating takes them
    counter[lane] = first + lane % 2 * (kCounters / 2) + lane / 2;
  // Of each 64-bit lane only the lower half counts until the end.
  U64 c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < philox::kRounds; ++round) {
    const U64 product0 = multiply_low(c0, U64{} + philox::kFactor0);
    const U64 product1 = multiply_low(c2, U64{} + philox::kFactor1);
    c0 = (product1 >> 32) ^ c1 ^ key0;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ key1;
    c3 = product0;
    key0 += philox::kStep0;
    key1 += philox::kStep1;
  }
  const U64 low = U64{} + 0xffffffffu;
  store_alternating(reinterpret_cast<uint64_t*>(to), (c0 & low) | c1 << 32, (c2 & low) | c3 << 32);
}

// Makes the words of the columns first .. first + n, and returns where the first column's is.
constexpr int64_t kWords = kBlock + 4 + 4 * kCounters;
const uint32_t* fill_words(uint64_t seed, int64_t first, int64_t n, uint32_t* words) {
  for (int64_t counter = first / 4, to = 0; counter * 4 < first + n; counter += kCounters, to += 4 * kCounters)
    random_words(seed, counter, words + to);
  return words + first % 4;
}

// The uniform numbers of a vector of words.
MTLFAST_INLINE void uniform_of(const uint32_t* words, F32& u) {
  u = __builtin_convertvector((I32)(load_unaligned<U32>(words) >> 9 << 1 | 1u), F32) * philox::kUnit;
}
MTLFAST_INLINE void uniform_of(const uint32_t* words, F64& u) {
  const HalfI32 bits = load_unaligned<HalfI32>(words);
  u = to_double(__builtin_convertvector((bits >> 9 & 0x7fffff) << 1 | 1, HalfF32) * philox::kUnit);
}

// What the elements of one block take besides the gradients.
template <class W>
struct Inputs {
  Dropping::Form form;
  const double* leak;
  const uint32_t* words;
  const W *uniform, *thresholds;

  MTLFAST_INLINE typename InOrder<W>::Vec numbers(int64_t c, int64_t left) const {
    if (uniform) return load_first(uniform + c, left);
    typename InOrder<W>::Vec u;
    uniform_of(words + c, u);
    return u;
  }
};

// n columns, in double. W: float, or double for double gradients.
template <class T, class W, bool Leak>
void drop(const T* const* rows, int64_t K, int64_t n, const Inputs<W>& in, T* to, W* purity) {
  using S = InOrder<T>;
  constexpr int wides = kWides<typename S::Vec>;
  for (int64_t c = 0; c < n; c += S::kStep) {
    F64 positive[wides] = {}, negative[wides] = {}, leak_positive[wides] = {}, leak_negative[wides] = {};
    for (int64_t k = 0; k < K; ++k) {
      const typename S::Vec row = S::load(rows[k] + c);
#pragma GCC unroll 2
      for (int i = 0; i < wides; ++i) {
        const F64 g = widened(row, i), zero = {}, above = g > zero ? g : zero, below = g - above;
        positive[i] += above;
        negative[i] += below;
        if (Leak) leak_positive[i] += in.leak[k] * above, leak_negative[i] += in.leak[k] * below;
      }
    }
    const int64_t left = n - c;
    typename S::Vec threshold = {}, u = {};
    if (in.thresholds) threshold = load_first(in.thresholds + c, left);
    if (in.form <= Dropping::Given) u = in.numbers(c, left);
    F64 result[wides];
#pragma GCC unroll 2
    for (int i = 0; i < wides; ++i) {
      const F64 s = positive[i], r = negative[i], total = s - r, wrong = total - total, zero = {}, one = zero + 1.0;
      if (in.form <= Dropping::Given) {
        const F64 least = widened(u, i) * (in.thresholds ? one : total);
        const F64 most = in.thresholds ? widened(threshold, i) : s;
        result[i] = (most > least ? s : leak_positive[i]) + (most < least ? r : leak_negative[i]) + wrong;
        continue;
      }
      const F64 p = in.thresholds ? widened(threshold, i) : total == zero ? zero + 0.5 : s / total;
      if (in.form == Dropping::Purity) {
        result[i] = p + wrong;
        continue;
      }
      const F64 kept = p < zero ? zero : p > one ? one : p, dropped = one - kept;
      result[i] = kept * s + dropped * leak_positive[i] + dropped * r + kept * leak_negative[i] + wrong;
    }
    if (in.form == Dropping::Purity)
      store_first(purity + c, narrowed(result), left);
    else
      store_first(to + c, narrowed(result), left);
  }
}

// The value in memory, so that the compiler rounds it before it is added to anything.
template <class V>
MTLFAST_INLINE V product(V v) {
  __asm__("" : "+m"(v));
  return v;
}

// n columns, every operation rounded to T.
template <class T, bool Leak>
void drop_rounding_each(const T* const* rows, int64_t K, int64_t n, const Inputs<T>& in, T* to) {
  using S = InOrder<T>;
  using V = typename S::Vec;
  constexpr int64_t kGroup = 16;
  for (int64_t c = 0; c < n; c += S::kStep) {
    V sum = {}, size = {}, if_positive = {}, if_negative = {}, if_neither = {};
    for (int64_t first = 0; first < K; first += kGroup) {
      V group = {}, group_size = {};
      for (int64_t k = first; k < K && k < first + kGroup; ++k) {
        const V g = S::load(rows[k] + c), zero = {};
        group += g;
        group_size += g < zero ? -g : g;
        // The factors of a gradient that is kept, and of one that is not.
        const T leak = Leak ? static_cast<T>(in.leak[k]) : 0;
        const V rest = zero + leak, whole = zero + (leak + (1 - leak));
        const V taken = (g > zero ? whole : rest) * g, left_out = (g < zero ? whole : rest) * g, leaked = rest * g;
        if_positive += Leak ? product(taken) : taken;  // without leak the factors are 0 and 1: nothing is rounded
        if_negative += Leak ? product(left_out) : left_out;
        if_neither += Leak ? product(leaked) : leaked;
      }
      sum += group;
      size += group_size;
    }
    const int64_t left = n - c;
    const V p = in.thresholds ? load_first(in.thresholds + c, left) : T(0.5) * (T(1) + sum / size);
    if (in.form == Dropping::Purity) {
      store_first(to + c, p, left);
      continue;
    }
    const V u = in.numbers(c, left);
    store_first(to + c, p > u ? if_positive : p < u ? if_negative : if_neither, left);
  }
}

template <class T>
void drop_range(const TaskView& grads, int64_t begin, int64_t end, const Dropping& dropping, void* scratch,
                void* const* out) {
  using W = typename Simd<T>::Scalar;
  uint32_t* words = static_cast<uint32_t*>(scratch);
  void* memory = static_cast<char*>(scratch) + round_up(kWords * 4, 64);
  for_each_row_block<T>(grads, begin, end, memory, [&](const T* const* rows, int64_t n, int64_t t, int64_t at) {
    const auto part = [&](const void* const* tensors) {
      return tensors ? static_cast<const W*>(tensors[t]) + at : nullptr;
    };
    Inputs<W> in{dropping.form, dropping.leak, nullptr, part(dropping.uniform), part(dropping.thresholds)};
    if (dropping.form == Dropping::Drawn) in.words = fill_words(*dropping.seed, grads.offsets[t] + at, n, words);
    T* to = static_cast<T*>(out[t]) + at;
    W* purity = static_cast<W*>(out[t]) + at;
    const auto with = [&]<bool Leak>() {
      if constexpr (sizeof(T) >= sizeof(float))
        if (dropping.round_each) return drop_rounding_each<T, Leak>(rows, grads.num_tasks, n, in, to);
      drop<T, W, Leak>(rows, grads.num_tasks, n, in, to, purity);
    };
    if (dropping.leak)
      with.template operator()<true>();
    else
      with.template operator()<false>();
  });
}

}  // namespace

int64_t grad_drop_scratch(int64_t num_tasks) { return round_up(kWords * 4, 64) + rows_scratch(num_tasks); }

void grad_drop(const TaskView& grads, int64_t begin, int64_t end, const Dropping& dropping, void* scratch,
               void* const* out) {
  visit(grads.dtype, [&]<class T>(T) { drop_range<T>(grads, begin, end, dropping, scratch, out); });
}

}  // namespace mtlfast::MTLFAST_ISA

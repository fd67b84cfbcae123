#pragma once
#include "../cuda_emulator.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                : std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  return v.bits >> 15 ? -value : value;
}
inline __half __float2half_rn(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return {0x7fff};
  const float size = std::fabs(v);
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < 0x1p-14f)  // subnormal, or rounded up to the smallest normal
    return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))))};
  int exponent;
  std::frexp(size, &exponent);  // size = f * 2^exponent, f in [0.5, 1)
  const uint32_t fraction = static_cast<uint32_t>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // 1024 .. 2048
  return {static_cast<uint16_t>(sign | (((exponent + 14) << 10) + (fraction - 1024)))};
}

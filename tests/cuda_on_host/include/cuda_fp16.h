// SPDX-License-Identifier: Apache-2.0
// Stands in for the header of the CUDA toolkit.
#pragma once
#include "cuda_device_emulation.h"

struct __half {
  uint16_t bits;
};
using half = __half;

inline float __half2float(__half value) {
  const uint32_t sign = uint32_t{value.bits} >> 15 << 31, exponent = value.bits >> 10 & 0x1F,
                 mantissa = value.bits & 0x3FF;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign ? -magnitude : magnitude;
  }
  if (exponent == 31) return __uint_as_float(sign | 0x7F800000 | mantissa << 13);
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline __half __float2half_rn(float value) {
  const uint32_t bits = __float_as_uint(value), magnitude = bits & 0x7FFFFFFF;
  const uint32_t sign = bits >> 16 & 0x8000;
  if (magnitude > 0x7F800000) return {0x7FFF};
  // 65520 and above round to infinity; below 2^-14 the result is subnormal, a multiple of 2^-24.
  if (magnitude >= 0x477FF000) return {static_cast<uint16_t>(sign | 0x7C00)};
  if (magnitude < 0x38800000) {
    const float scaled = std::ldexp(__uint_as_float(magnitude), 24);
    return {static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(scaled)))};
  }
  const uint32_t rounded = magnitude - (112u << 23) + 0xFFF + (magnitude >> 13 & 1);
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
inline __half __float2half(float value) {
  return __float2half_rn(value);
}

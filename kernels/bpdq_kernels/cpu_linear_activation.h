/* Between the two matrices of an expert, and rounding to 16 bits. */

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu_linear_tiles.h"

namespace {

/* To the nearest, ties to even. */
inline uint16_t narrow_to_bfloat(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 64;  // NaN
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

inline uint16_t narrow_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;   // NaN
  if (bits >= 0x477ff000) return sign | 0x7c00;  // from 65520 on
  if (bits < 0x38800000) {                       // less than 2^-14: to multiples of 2^-24, which 0.5's last bit is
    const float sum = std::fabs(value) + 0.5f;
    memcpy(&bits, &sum, sizeof bits);
    return sign | (bits - 0x3f000000);
  }
  return sign | (bits + 0xfff + (bits >> 13 & 1) - 0x38000000) >> 13;
}

/* LANES numbers as 16 bits of `dtype`. */
inline Halves narrow(Floats values, Dtype dtype) {
  if (dtype == BFLOAT16) {
    const Words bits = (Words)values, even = bits >> 16 & 1;
    const Words nan = (Words)((bits & 0x7fffffff) > 0x7f800000);
    const Words all = ((bits + 0x7fff + even) >> 16 & ~nan) | ((bits >> 16 | 64) & nan);
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)all);
#else
    return __builtin_convertvector(all, Halves);
#endif
  }
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (Halves)_mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT);
#else
  Halves halves;
  for (int lane = 0; lane < LANES; lane++) halves[lane] = narrow_to_half(values[lane]);
  return halves;
#endif
}

inline float silu(float x) { return x / (1 + std::exp(-x)); }
inline float gelu(float x) { return 0.5f * x * (1 + std::erf(x * 0.70710678f)); }
inline float gelu_tanh(float x) { return 0.5f * x * (1 + std::tanh(0.79788456f * (x + 0.044715f * x * x * x))); }

/* `bpdq_kernels.activation.Activation`. */
struct Activation {
  enum Name { SILU, GELU, GELU_TANH, SWIGLUOAI, RELU2_NO_MUL, SILU_NO_MUL, GELU_NO_MUL } name;  // in its order
  float alpha, limit;

  /* Of the first number of gate, and up's `inner` places on, or of up alone. */
  float of(const float* values, int64_t inner) const {
    float gate = values[0];
    if (name == RELU2_NO_MUL) return gate < 0 ? 0 : gate * gate;
    if (name == SILU_NO_MUL) return silu(gate);
    if (name == GELU_NO_MUL) return gelu(gate);
    float up = values[inner];
    if (gate > limit) gate = limit;
    if (up > limit) up = limit;
    if (up < -limit) up = -limit;
    if (name == SWIGLUOAI) return gate / (1 + std::exp(-alpha * gate)) * (up + 1);
    return (name == SILU ? silu(gate) : name == GELU ? gelu(gate) : gelu_tanh(gate)) * up;
  }
};

}  // namespace

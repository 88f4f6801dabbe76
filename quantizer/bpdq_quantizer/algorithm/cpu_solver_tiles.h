/* Vectors of rows, and what all loops over a group's columns share. */

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 16;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));


constexpr int BLOCK = 8;  // inputs of a sweep

enum Dtype { FLOAT32, FLOAT16, BFLOAT16, INT8 };

inline bool any(Ints mask) {
  int32_t found = 0;
  for (int i = 0; i < LANES; ++i) found |= mask[i];
  return found != 0;
}

inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

inline Floats round_even(Floats x) {  // |x| < 2^22
  const float big = 0x1.8p23f;
  return (x + big) - big;
}

/* x rounded to the dtype in which coefficients are stored. */
inline Floats rounded(Floats x, Dtype dtype) {
  if (dtype == FLOAT32) return x;
  if (dtype == BFLOAT16) {
    Ints bits = (Ints)x;
    Ints up = bits + 0x7fff + ((bits >> 16) & 1);
    return x == x ? (Floats)(up & (int32_t)0xffff0000) : x;
  }
  Floats y;
#if defined(__AVX512F__)
  y = (Floats)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)x, 0));
#elif defined(__AVX2__)
  y = (Floats)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < LANES; ++i) y[i] = (float)(_Float16)x[i];
#endif
  return y;
}

/* The 2^k levels of a group's rows, in ascending order, with the midpoints between them and their codes. */
template <int k>
struct Levels {
  static constexpr int PLANES = k, COUNT = 1 << k;
  Floats level[COUNT], midpoint[COUNT];
  Ints code[COUNT];

  explicit Levels(const Floats* c) {
    for (int j = 0; j < COUNT; ++j) {
      level[j] = c[k];
      for (int p = 0; p < k; ++p)
        if (j >> p & 1) level[j] += c[p];
      code[j] = Ints{} + j;
    }
    for (int end = COUNT - 1; end > 0; --end)
      for (int j = 0; j < end; ++j) {
        Ints swap = level[j] > level[j + 1];
        Floats low = swap ? level[j + 1] : level[j];
        level[j + 1] = swap ? level[j] : level[j + 1];
        level[j] = low;
        Ints first = swap ? code[j + 1] : code[j];
        code[j + 1] = swap ? code[j] : code[j + 1];
        code[j] = first;
      }
    for (int j = 0; j + 1 < COUNT; ++j) midpoint[j] = (level[j] + level[j + 1]) / 2;
  }

  /* The nearest level of w, and its code. */
  inline Floats nearest(Floats w, Ints& found) const {
    Floats best = level[0];
    found = code[0];
    for (int j = 0; j + 1 < COUNT; ++j) {
      Ints above = w > midpoint[j];
      best = above ? level[j + 1] : best;
      found = above ? code[j + 1] : found;
    }
    return best;
  }
};

/* The lanes in which a code changed, and what the codes cost. */
struct Swept {
  Ints moved;
  Floats cost;
};

/* Column after column: e[t] = step.error(t, w, nearest level of w), where w = base[t] - sum over j < t of S[j][t] e[j],
   at step.cost(t, w, e[t]). S: [g, g], row-major. */
template <int k, class Step>
Swept sweep(const Levels<k>& levels, const Floats* base, const float* S, int g, Ints* codes, Floats* e, Step step) {
  Swept swept{};
  for (int first = 0; first < g; first += BLOCK) {
    const int count = std::min(BLOCK, g - first);
    Floats w[BLOCK];
    for (int i = 0; i < count; ++i) w[i] = base[first + i];
    if (count == BLOCK)
      for (int j = 0; j < first; ++j)
        for (int i = 0; i < BLOCK; ++i) w[i] -= S[(int64_t)j * g + first + i] * e[j];
    else
      for (int j = 0; j < first; ++j)
        for (int i = 0; i < count; ++i) w[i] -= S[(int64_t)j * g + first + i] * e[j];
    for (int i = 0; i < count; ++i) {
      const int t = first + i;
      Ints code;
      Floats level = levels.nearest(w[i], code);
      swept.moved |= code != codes[t];
      codes[t] = code;
      e[t] = step.error(t, w[i], level);
      swept.cost += step.cost(t, w[i], e[t]);
      for (int later = i + 1; later < count; ++later) w[later] -= S[(int64_t)t * g + first + later] * e[t];
    }
  }
  return swept;
}

inline Floats plane(Ints code, int p) { return (Floats)(-(code >> p & 1) & 0x3f800000); }

template <class T, class V>
inline void load(V& to, const T* from, int lanes) {
  to = V{};
  for (int i = 0; i < lanes; ++i) to[i] = from[i];
}

template <class T, class V>
inline void store(T* to, const V& from, int lanes) {
  for (int i = 0; i < lanes; ++i) to[i] = (T)from[i];
}

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += x[i];
  return total;
}

/* `count` floats, zeros after them. */
inline Floats first_of(const float* from, int count) {
  Floats x{};
  if (count >= LANES) memcpy(&x, from, sizeof x);
  else if (count > 0) memcpy(&x, from, sizeof(float) * count);
  return x;
}

}  // namespace

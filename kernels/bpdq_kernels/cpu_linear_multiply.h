/* For many tokens: a group's possible weights, among which the bits of a word choose, times inputs. */

#pragma once

#include "cpu_linear_tiles.h"

namespace {

/* FIRST shifted left by 0 .. 31, in memory: the vector units load it without help of the integer units. */
template <uint32_t FIRST>
struct Shifted {
  uint32_t by[WORD] = {};
  constexpr Shifted() {
    for (int i = 0; i < WORD; i++) by[i] = FIRST << i;
  }
};
constexpr Shifted<1> BIT;
constexpr Shifted<0x10001> BIT_OF_BOTH_HALVES;

/* How Multiply holds weights and multiplies them: one input of fp32 at a time ... */
struct OneFloat {
  using Input = float;
  using Weights = Floats;
  using Activation = float;
  static constexpr int STEPS = WORD;  // per word
  static Weights round(Floats w) { return w; }
#if defined(__AVX512F__)
  using Mask = __mmask16;
  static Mask test(Words bits, int step) {
    return _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(BIT.by[step]));
  }
  static Weights blend(Mask bit, Weights off, Weights on) { return _mm512_mask_blend_ps(bit, off, on); }
#elif defined(__AVX2__)
  using Mask = Words;
  static Mask test(Words bits, int step) { return bits << (31 - step); }  // blendv looks at the sign
  static Weights blend(Mask bit, Weights off, Weights on) { return _mm256_blendv_ps(off, on, (__m256)bit); }
#else
  using Mask = Words;
  static Mask test(Words bits, int step) { return (Words)((bits & BIT.by[step]) != 0); }
  static Weights blend(Mask bit, Weights off, Weights on) { return (Floats)(((Words)on & bit) | ((Words)off & ~bit)); }
#endif
  static void pick(const Input* x, Activation* to) { memcpy(to, x, WORD * sizeof *x); }
  static Floats multiply(Floats sum, Weights w, Activation x) { return sum + w * x; }
};

#ifdef __AVX512BF16__
/* ... or two of bf16, from the two halves of a word. */
struct TwoBfloats {
  using Input = uint16_t;
  using Weights = __m512i;
  using Mask = __mmask32;
  using Activation = uint32_t;
  static constexpr int STEPS = WORD / 2;
  static Weights round(Floats w) {
    const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)w));
    return _mm512_or_si512(half, _mm512_slli_epi32(half, 16));
  }
  static Mask test(Words bits, int step) {
    return _mm512_test_epi16_mask((__m512i)bits, _mm512_set1_epi32(BIT_OF_BOTH_HALVES.by[step]));
  }
  static Weights blend(Mask bit, Weights off, Weights on) { return _mm512_mask_blend_epi16(bit, off, on); }
  static void pick(const Input* x, Activation* to) {
    const __m512i first = _mm512_cvtepu16_epi32(load<__m256i>(x));
    const __m512i second = _mm512_cvtepu16_epi32(load<__m256i>(x + STEPS));
    const __m512i pairs = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
    memcpy(to, &pairs, sizeof pairs);
  }
  static Floats multiply(Floats sum, Weights w, Activation x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
  }
};
#endif

/* The weights of LANES outputs in one group. */
template <int PLANES, class Arithmetic>
struct Chooser {
  using Weights = typename Arithmetic::Weights;
  using Mask = typename Arithmetic::Mask;
  Weights level[1 << PLANES];  // bit p of the index = plane p

  explicit Chooser(const Coefficients<PLANES>& c) {
    Floats exact[1 << PLANES] = {c.of[PLANES]};
    for (int p = 0; p < PLANES; p++)
      for (int i = 0; i < 1 << p; i++) exact[i + (1 << p)] = exact[i] + c.of[p];
    for (int i = 0; i < 1 << PLANES; i++) level[i] = Arithmetic::round(exact[i]);
  }

  /* Those of inputs `step` of the word that starts at `planes`. */
  __attribute__((always_inline)) Weights at(const uint32_t* planes, int step) const {
    Mask bit[PLANES];
    for (int p = 0; p < PLANES; p++) bit[p] = Arithmetic::test(load<Words>(planes + p * TILE), step);
    return choose<PLANES>(level, bit);
  }

  template <int BITS>
  static Weights choose(const Weights* level, const Mask* bit) {
    if constexpr (BITS == 0)
      return level[0];
    else
      return Arithmetic::blend(bit[BITS - 1], choose<BITS - 1>(level, bit),
                               choose<BITS - 1>(level + (1 << (BITS - 1)), bit));
  }
};

template <int PLANES, class Arithmetic>
struct Multiply {
  static constexpr Form FORM = WORDS;
  static constexpr int ROW = LANES == 16 ? 8 : 4;  // tokens whose sums for two registers of outputs stay in registers
  static constexpr int TOKENS = 16 * ROW, AT_ONCE = ROW;
  static constexpr int STEPS = Arithmetic::STEPS;
  using Input = typename Arithmetic::Input;
  using Weights = typename Arithmetic::Weights;

  struct Pair {
    Weights of[2];  // neighbouring registers of outputs
  };

  /* Words whose weights, of a tile, are held in 16 KiB: those of several groups, where they are small. */
  static constexpr int WORDS_AT_ONCE = (16 << 10) / (STEPS * TILE * 4);
  static_assert(WORDS_AT_ONCE <= MAX_GROUP / WORD);

  alignas(64) typename Arithmetic::Activation x[TOKENS][MAX_GROUP / WORD * STEPS];
  alignas(64) Pair weights[TILE / LANES / 2][MAX_GROUP / WORD * STEPS];

  void take(int token, const Input* values, int words) {
    for (int word = 0; word < words; word++) Arithmetic::pick(values + word * WORD, x[token] + word * STEPS);
  }

  /* Makes the weights of a group, whose words are those from `first` on of what was taken. */
  void make(const TileGroup<PLANES>& tile, int first) {
    for (int i = 0; i < TILE / LANES; i += 2) {
      const Chooser<PLANES, Arithmetic> left(tile.c[i]), right(tile.c[i + 1]);
      for (int word = 0; word < tile.words; word++)
        for (int step = 0; step < STEPS; step++) {
          const uint32_t* start = tile.planes + word * PLANES * TILE + i * LANES;
          weights[i / 2][(first + word) * STEPS + step] = {{left.at(start, step), right.at(start + LANES, step)}};
        }
    }
  }

  /* Makes the weights of a group; with those of the last one, adds the products of all to y. */
  void tile(const TileGroup<PLANES>& tile, int tokens, float* y, int first, bool is_last) {
    make(tile, first);
    if (!is_last) return;
    const int steps = (first + tile.words) * STEPS;
    for (int i = 0; i < TILE / LANES; i += 2) {
      int token = 0;
      for (; tokens - token > ROW - 4; token += ROW) accumulate<ROW>(weights[i / 2], steps, token, y + i * LANES);
      for (; token < tokens; token += 4) accumulate<4>(weights[i / 2], steps, token, y + i * LANES);
    }
  }

  /* Adds the products of COUNT tokens from `first` on to y. */
  template <int COUNT>
  void accumulate(const Pair* pairs, int steps, int first, float* y) const {
    Floats sums[COUNT][2];
    y += first * TILE;
#pragma GCC unroll 32
    for (int i = 0; i < 2 * COUNT; i++) sums[i / 2][i % 2] = load<Floats>(y + i / 2 * TILE + i % 2 * LANES);
    for (int step = 0; step < steps; step++)
#pragma GCC unroll 32
      for (int i = 0; i < 2 * COUNT; i++)
        sums[i / 2][i % 2] = Arithmetic::multiply(sums[i / 2][i % 2], pairs[step].of[i % 2], x[first + i / 2][step]);
#pragma GCC unroll 32
    for (int i = 0; i < 2 * COUNT; i++) memcpy(y + i / 2 * TILE + i % 2 * LANES, &sums[i / 2][i % 2], sizeof(Floats));
  }
};

}  // namespace

/* For few tokens: partial sums of their inputs, which the bits of a word pick. */

#pragma once

#include "cpu_linear_tiles.h"

namespace {

/* Where each lane's low TABLE_BITS bits point to in `table`. */
inline Floats lookup(Floats table, Words index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#else
  return (Floats)((Words)(table[1] + Floats{}) & -(index & 1));
#endif
}

/* What one thread knows of the tokens' inputs in one group, and how a tile uses it. */
template <int PLANES>
struct Lookup {
  using Input = float;
  static constexpr Form FORM = WORDS;
  static constexpr int TOKENS = 8, AT_ONCE = 1;  // `tile` writes sums of a multiple of AT_ONCE tokens
  static constexpr int WORDS_AT_ONCE = 1;        // at least; whole groups of them are taken at once
  static constexpr int ROOM = (LANES == 16 ? 31 : 15) / (2 * PLANES) - 2;  // tokens whose sums stay in registers
  static constexpr int TOGETHER = ROOM >= 4 ? 4 : ROOM >= 2 ? 2 : 1;
  alignas(64) float table[TOKENS][MAX_GROUP / WORD * TABLES][LANES];
  float total[TOKENS];

  void take(int token, const Input* values, int words) {
    Floats sum = {};
    for (int i = 0; i < words * WORD; i += LANES) sum += load<Floats>(values + i);
    total[token] = 0;
    for (int lane = 0; lane < LANES; lane++) total[token] += sum[lane];
    Floats member[TABLE_BITS];  // 1 in the lanes whose number has this bit
    for (int bit = 0; bit < TABLE_BITS; bit++)
      for (int lane = 0; lane < LANES; lane++) member[bit][lane] = lane >> bit & 1;
    for (int word = 0; word < words; word++)
      for (int j = 0; j < TABLES; j++) {
        const float* first = values + word * WORD + j * TABLE_BITS;
        Floats sums = {};
        for (int bit = 0; bit < TABLE_BITS; bit++)
          if (j * TABLE_BITS + bit < WORD) sums += member[bit] * first[bit];
        memcpy(table[token][word * TABLES + j], &sums, sizeof sums);
      }
  }

  /* Adds the products of COUNT tokens from `first` to y, for the tile's registers `i` and i + 1. Inlined it would
     share its registers with its caller, and spill. */
  template <int COUNT>
  __attribute__((noinline)) void accumulate(const TileGroup<PLANES>& tile, int i, int first, float* y) const {
    Floats sums[COUNT][2][PLANES] = {};
    for (int word = 0; word < tile.words; word++) {
      const int64_t start = word * PLANES * TILE + i * LANES;
      Words bits[2][PLANES];
      for (int p = 0; p < PLANES; p++)
        for (int side = 0; side < 2; side++) {
          bits[side][p] = load<Words>(tile.planes + start + p * TILE + side * LANES);
          fetch(tile.ahead + start + p * TILE + side * LANES);
        }
#pragma GCC unroll 16
      for (int j = 0; j < TABLES; j++) {
#pragma GCC unroll 4
        for (int token = 0; token < COUNT; token++) {
          const Floats held = load<Floats>(table[first + token][word * TABLES + j]);
#pragma GCC unroll 8
          for (int n = 0; n < 2 * PLANES; n++)
            sums[token][n % 2][n / 2] += tile.c[i + n % 2].of[n / 2] * lookup(held, bits[n % 2][n / 2]);
        }
#pragma GCC unroll 8
        for (int n = 0; n < 2 * PLANES; n++) bits[n % 2][n / 2] >>= TABLE_BITS;
      }
    }
    for (int token = 0; token < COUNT; token++)
      for (int side = 0; side < 2; side++) {
        float* out = y + (first + token) * TILE + (i + side) * LANES;
        Floats result = load<Floats>(out) + tile.c[i + side].of[PLANES] * total[first + token];
        for (int p = 0; p < PLANES; p++) result += sums[token][side][p];
        memcpy(out, &result, sizeof result);
      }
  }

  void tile(const TileGroup<PLANES>& tile, int tokens, float* y) const {
    for (int i = 0; i < TILE / LANES; i += 2) {
      int token = 0;
      for (; token + TOGETHER <= tokens; token += TOGETHER) accumulate<TOGETHER>(tile, i, token, y);
      for (; token < tokens; token++) accumulate<1>(tile, i, token, y);
    }
  }
};

}  // namespace

/* For inputs of 16 bits with AVX2: their sums as integers of 16 bits, whose two bytes the bits of a byte pick.

   In a group inputs are rounded to multiples of a power of two, such that four neighbours together are less than 2^15
   of them: of bf16 that touches at most those smaller than 1/32 of the largest, of fp16 1/4. A bit adds or
   subtracts half an input, so that sums are as often negative as positive; half the sum of all inputs makes up for it.

   A register holds one byte of 32 outputs. Each half of it, four inputs, picks among 16 sums:

     low, high = shuffle(table of low bytes, half), shuffle(table of high bytes, half)

   The bytes of the two halves are added in pairs, low and high ones apart, to 16 bits, which hold a whole group. */

#pragma once

#include <cmath>

#include "cpu_linear_tiles.h"

#ifdef BPDQ_BYTES
namespace {

/* Signs of input `first` and of the next one in the sums that register `half` of two holds, which packing puts in
   order: + where their number has the input's bit. */
inline __m256i signs(int first, int half) {
  alignas(32) int16_t sign[16];
  for (int lane = 0; lane < 8; lane++)
    for (int i = 0; i < 2; i++) {
      const int number = lane % 4 + 4 * half + lane / 4 * 8;
      sign[2 * lane + i] = number >> (first + i) & 1 ? 1 : -1;
    }
  return load<__m256i>(sign);
}

template <int PLANES>
struct LookupBytes {
  using Input = float;
  static constexpr Form FORM = BYTES;
  static constexpr int WORDS_AT_ONCE = 1;
  static constexpr int TOKENS = 32, AT_ONCE = 1, STEP = 8, STEPS = WORD / STEP;  // inputs of a byte
  /* Of STEP inputs: low bytes of the first four's sums, of the last four's, and high bytes. */
  struct Table {
    uint8_t low[2][16], high[2][16];
  };
  alignas(64) Table table[TOKENS * MAX_GROUP / STEP];
  float total[TOKENS], unit[TOKENS];  // of inputs their sum, and what 1 stands for

  void take(int token, const Input* values, int words) {
    const float scale = measure(token, values, words * WORD);
    alignas(32) int16_t whole[MAX_GROUP];
    for (int i = 0; i < words * WORD; i += 2 * LANES) {
      const auto at = [&](int i) { return _mm256_cvtps_epi32((__m256)(load<Floats>(values + i) * scale)); };
      const __m256i packed = _mm256_packs_epi32(at(i), at(i + LANES));
      _mm256_store_si256((__m256i*)(whole + i), _mm256_permute4x64_epi64(packed, 0xd8));
    }
    const __m256i front[2] = {signs(0, 0), signs(0, 1)}, back[2] = {signs(2, 0), signs(2, 1)};
    for (int step = 0; step < words * WORD / STEP; step++) {
      __m256i sums[2];
      for (int half = 0; half < 2; half++) {
        const int16_t* four = whole + step * STEP + 4 * half;
        const __m256i first = _mm256_set1_epi32(load<int>(four)), last = _mm256_set1_epi32(load<int>(four + 2));
        const auto sum = [&](int i) {
          return _mm256_add_epi32(_mm256_madd_epi16(first, front[i]), _mm256_madd_epi16(last, back[i]));
        };
        sums[half] = _mm256_packs_epi32(sum(0), sum(1));
      }
      const __m256i byte = _mm256_set1_epi16(255);
      const __m256i low = _mm256_packus_epi16(_mm256_and_si256(sums[0], byte), _mm256_and_si256(sums[1], byte));
      const __m256i high = _mm256_packs_epi16(_mm256_srai_epi16(sums[0], 8), _mm256_srai_epi16(sums[1], 8));
      Table& to = table[token * (words * WORD / STEP) + step];
      _mm256_store_si256((__m256i*)to.low, _mm256_permute4x64_epi64(low, 0xd8));
      _mm256_store_si256((__m256i*)to.high, _mm256_permute4x64_epi64(high, 0xd8));
    }
  }

  /* Sets `total` and `unit`, and returns the factor that makes whole numbers of inputs. */
  float measure(int token, const Input* values, int count) {
    const __m256 positive = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    Floats sum = {}, most = {};  // NaN and infinity both end in an exponent of ones
    for (int i = 0; i < count; i += 2 * LANES) {
      const Floats a = load<Floats>(values + i), b = load<Floats>(values + i + LANES);
      sum += a + b;
      const __m256 two = _mm256_hadd_ps(_mm256_and_ps((__m256)a, positive), _mm256_and_ps((__m256)b, positive));
      const __m256 four = _mm256_add_ps(two, _mm256_permute_ps(two, 0xb1));
      most = (Floats)_mm256_max_epi32((__m256i)most, (__m256i)four);
    }
    int largest = 0;
    total[token] = 0;
    for (int lane = 0; lane < LANES; lane++) {
      total[token] += sum[lane];
      largest = std::max(largest, (int)((Words)most)[lane]);
    }
    const int exponent = std::max(largest >> 23, 16);  // four inputs are below 2^(exponent - 126)
    const auto power = [](int biased) {
      const int bits = biased << 23;
      return load<float>(&bits);
    };
    unit[token] = exponent < 255 ? power(exponent - 15) : NAN;
    return power(268 - exponent);
  }

  /* Adds the products of COUNT tokens from `first` to y. */
  template <int COUNT>
  __attribute__((noinline)) void accumulate(const TileGroup<PLANES>& tile, int first, float* y) const {
    constexpr int REGISTERS = TILE / LANES;
    Floats results[COUNT][REGISTERS];
    y += first * TILE;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT * REGISTERS; i++)
      results[i / REGISTERS][i % REGISTERS] =
          load<Floats>(y + i * LANES) + tile.c[i % REGISTERS].of[PLANES] * total[first + i / REGISTERS];
    for (int p = 0; p < PLANES; p++) {
      __m256i low[COUNT][2] = {}, high[COUNT][2] = {};
      for (int word = 0; word < tile.words; word++)
        add_word(tile, (word * PLANES + p) * TILE, table + (first * tile.words + word) * STEPS, low, high);
      const __m256i weights = _mm256_set1_epi32(256 << 16 | 1);
#pragma GCC unroll 8
      for (int i = 0; i < COUNT * REGISTERS; i++) {
        const int token = i / REGISTERS, r = i % REGISTERS;
        const auto both = r % 2 ? _mm256_unpackhi_epi16(low[token][r / 2], high[token][r / 2])
                                : _mm256_unpacklo_epi16(low[token][r / 2], high[token][r / 2]);
        const Floats sums = (Floats)_mm256_cvtepi32_ps(_mm256_madd_epi16(both, weights));
        results[token][r] += tile.c[r].of[p] * (sums * unit[first + token] + total[first + token] / 2);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < COUNT * REGISTERS; i++)
      memcpy(y + i * LANES, &results[i / REGISTERS][i % REGISTERS], sizeof(Floats));
  }

  /* Adds what the plane's word at `start` picks of the first token's `tables` and those of the COUNT - 1 tokens after
     it to the sums of bytes, of outputs whose 16 bits two registers hold. */
  template <int COUNT>
  __attribute__((always_inline)) static void add_word(const TileGroup<PLANES>& tile, int64_t start, const Table* tables,
                                                      __m256i (&low)[COUNT][2], __m256i (&high)[COUNT][2]) {
    const __m256i ones = _mm256_set1_epi8(1), half = _mm256_set1_epi8(15);
    const auto add = [](__m256i& sum, __m256i more) {
      sum = _mm256_add_epi16(sum, more);
      asm("" : "+x"(sum));  // in this order, or gcc runs out of registers
    };
#pragma GCC unroll 4
    for (int step = 0; step < STEPS; step++) {
      const __m256i bits = load<__m256i>(tile.planes + start + step * LANES);
      if (step % 2 == 0) fetch(tile.ahead + start + step * LANES);
      const __m256i front = _mm256_and_si256(bits, half), back = _mm256_and_si256(_mm256_srli_epi16(bits, 4), half);
#pragma GCC unroll 4
      for (int i = 0; i < COUNT; i++) {
        const Table& from = tables[i * tile.words * STEPS + step];
        const auto pick = [](const uint8_t* bytes, __m256i which) {
          return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load<__m128i>(bytes)), which);
        };
        const __m256i low0 = pick(from.low[0], front), low1 = pick(from.low[1], back);
        const __m256i high0 = pick(from.high[0], front), high1 = pick(from.high[1], back);
        add(low[i][0], _mm256_maddubs_epi16(_mm256_unpacklo_epi8(low0, low1), ones));
        add(low[i][1], _mm256_maddubs_epi16(_mm256_unpackhi_epi8(low0, low1), ones));
        add(high[i][0], _mm256_maddubs_epi16(ones, _mm256_unpacklo_epi8(high0, high1)));
        add(high[i][1], _mm256_maddubs_epi16(ones, _mm256_unpackhi_epi8(high0, high1)));
      }
    }
  }

  void tile(const TileGroup<PLANES>& tile, int tokens, float* y) const {
    int token = 0;
    for (; token + 2 <= tokens; token += 2) accumulate<2>(tile, token, y);
    if (token < tokens) accumulate<1>(tile, token, y);
  }
};

}  // namespace
#endif

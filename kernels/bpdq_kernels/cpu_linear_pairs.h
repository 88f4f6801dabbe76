/* With AVX-512 VBMI and VNNI: sums of inputs as whole numbers, in pairs of bytes that the bits of a word pick.

   In a group inputs are rounded to multiples of a power of two, such that four neighbours together are less than 2^15
   of them, of fp32 2^30: one pair of bytes, or two. A sum of some of four inputs, less the smallest such sum, is

     32640 + low - 128 * high        low = 0 .. 127, high = 0 .. 255        (in each pair's place)

   and 64 bytes are the sums of the four inputs at the start, or of the four at the end, of each byte of a word, of
   which a permutation picks one for each byte. A dot product adds those of an output to 32 bits:

     bits    = word & 0x0f0f0f0f | 0x30201000;  other bits = word >> 4 & 0x0f0f0f0f | 0x30201000
     sums   += 1 * (permute(low, bits) + permute(other low, other bits))
     sums   -= 128 * permute(high, bits) + 128 * permute(other high, other bits)     11 instructions for 512 plane bits

   Sums of a group are exact, and what is constant in them is what they start from. Of trellis-coded planes z0 is x moved
   to the next place, so x picks among sums of inputs moved the other way. */

#pragma once

#include <cmath>

#include "cpu_linear_tiles.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define BPDQ_PAIRS
namespace {

/* Of a word where to look: for the four inputs at the start of each byte, and for those at its end. */
struct Bits {
  __m512i of[2];
  Bits() = default;
  Bits(__m512i word, __m512i four, __m512i place) {
    constexpr int AND_OR = 0xea;  // word & four | place
    of[1] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(word, 4), four, place, AND_OR);
    of[0] = _mm512_ternarylogic_epi32(word, four, place, AND_OR);
  }
};

/* Where byte FIRST, or in the odd rows of 16 byte FIRST + 2, of each of 2 x 16 numbers is. */
template <int FIRST>
struct ByteOfEach {
  alignas(64) uint8_t at[64] = {};
  constexpr ByteOfEach() {
    for (int i = 0; i < 64; i++) at[i] = i / 32 * 64 + i % 16 * 4 + i / 16 % 2 * 2 + FIRST;
  }
};
constexpr ByteOfEach<0> LOW_BYTES;
constexpr ByteOfEach<1> HIGH_BYTES;

template <int PLANES, bool TRELLIS, int PAIRS>
struct LookupPairs {
  using Input = float;
  static constexpr Form FORM = STORED;
  static constexpr int WORDS_AT_ONCE = 1;
  static constexpr int TOKENS = 16, AT_ONCE = 1, SIDES = TILE / LANES;
  static constexpr int DIGITS = 15, MOST = (1 << DIGITS) - 1;  // bits of a pair, and what it holds
  static constexpr int FOUR = 4, PLACES = WORD / 8;            // inputs of a sum, bytes of a word
  /* Of a word's inputs, for each pair: bytes of the sums of those at the start of its bytes, then at the end. */
  struct Table {
    alignas(64) uint8_t low[PAIRS][2][64], high[PAIRS][2][64];
  };
  Table table[TOKENS][1 + TRELLIS][MAX_GROUP / WORD];  // of inputs, and of those one place later
  int start[TOKENS][1 + TRELLIS][PAIRS];               // of the sums
  float total[TOKENS], unit[TOKENS];                   // of inputs their sum, and what 1 stands for
  // in memory, from where they are spread without help of the vector units
  int four = 0x0f0f0f0f, place = 0x30201000, one = 0x01010101, minus_128 = 0x80808080;

  void take(int token, const Input* values, int words) {
    alignas(64) float later[MAX_GROUP];
    if (TRELLIS) {
      memcpy(later, values + 1, (words * WORD - 1) * sizeof *later);
      for (int word = 0; word < words; word++) later[word * WORD + WORD - 1] = 0;
    }
    uint32_t largest = measure(token, values, words);
    if (TRELLIS) largest = std::max(largest, most(later, words));
    const int exponent = std::max<int>(largest >> 23, DIGITS * PAIRS);  // four inputs are below 2^(exponent - 126)
    const auto power = [](int biased) {
      const int bits = biased << 23;
      return load<float>(&bits);
    };
    unit[token] = exponent < 255 ? power(exponent + 1 - DIGITS * PAIRS) : NAN;
    const float scale = power(253 - exponent + DIGITS * PAIRS);
    fill(table[token][0], start[token][0], values, scale, words);
    if (TRELLIS) fill(table[token][TRELLIS], start[token][TRELLIS], later, scale, words);
  }

  uint32_t measure(int token, const Input* values, int words) {
    Floats sum = {};
    for (int i = 0; i < words * WORD; i += LANES) sum += load<Floats>(values + i);
    total[token] = _mm512_reduce_add_ps((__m512)sum);
    return most(values, words);
  }

  /* The bits of the most that four inputs have together; NaN and infinity both end in an exponent of ones. */
  static uint32_t most(const Input* values, int words) {
    __m512i most = {};
    for (int i = 0; i < words * WORD; i += LANES) {
      const __m512 one = _mm512_abs_ps((__m512)load<Floats>(values + i));
      const __m512 two = _mm512_add_ps(one, _mm512_permute_ps(one, 0xb1));
      most = _mm512_max_epu32(most, (__m512i)_mm512_add_ps(two, _mm512_permute_ps(two, 0x4e)));
    }
    return _mm512_reduce_max_epu32(most);
  }

  static void fill(Table* to, int* start, const float* values, float scale, int words) {
    alignas(64) int whole[MAX_GROUP], rest[MAX_GROUP];  // inputs, and what the smallest sum of four leaves of the most
    __m512i below[PAIRS] = {};
    for (int i = 0; i < words * WORD; i += LANES) {
      const __m512i all = _mm512_cvtps_epi32((__m512)(load<Floats>(values + i) * scale));
      const __m512i one = _mm512_min_epi32(all, _mm512_setzero_si512());
      const __m512i two = _mm512_add_epi32(one, _mm512_shuffle_epi32(one, _MM_PERM_CDAB));
      const __m512i four = _mm512_add_epi32(two, _mm512_shuffle_epi32(two, _MM_PERM_BADC));
      _mm512_store_si512(whole + i, all);
      _mm512_store_si512(rest + i, _mm512_add_epi32(four, _mm512_set1_epi32((1 << DIGITS * PAIRS) - 1)));
      below[PAIRS - 1] = _mm512_add_epi32(below[PAIRS - 1], _mm512_srai_epi32(four, DIGITS * (PAIRS - 1)));
      if (PAIRS == 2) below[0] = _mm512_add_epi32(below[0], _mm512_and_si512(four, _mm512_set1_epi32(MOST)));
    }
    for (int pair = 0; pair < PAIRS; pair++)
      start[pair] = _mm512_reduce_add_epi32(below[pair]) / FOUR + words * (WORD / FOUR) * 128 * 255;
    for (int word = 0; word < words; word++)
      for (int half = 0; half < 2; half++) {
        __m512i left[PLACES];  // by the 16 sums of four inputs, of the most
        for (int place = 0; place < PLACES; place++) {
          const int first = word * WORD + place * 8 + half * FOUR;
          left[place] = _mm512_set1_epi32(rest[first]);
          for (int i = 0; i < FOUR; i++) {
            constexpr uint16_t MEMBERS[FOUR] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};  // the sums that an input is in
            left[place] = _mm512_mask_sub_epi32(left[place], MEMBERS[i], left[place], _mm512_set1_epi32(whole[first + i]));
          }
          // rounded up, four may be 2 more than they were
          left[place] = _mm512_max_epi32(left[place], _mm512_setzero_si512());
        }
        for (int pair = 0; pair < PAIRS; pair++) {
          __m512i both[PLACES];  // bytes of a sum: low, then high
          for (int place = 0; place < PLACES; place++) {
            const __m512i digits = _mm512_srli_epi32(left[place], DIGITS * pair);
            const __m512i high = _mm512_and_si512(_mm512_slli_epi32(digits, 1), _mm512_set1_epi32(0xff00));
            constexpr int OR_ANDNOT = 0xf4;  // high | 127 & ~digits
            both[place] = _mm512_ternarylogic_epi32(high, _mm512_set1_epi32(127), digits, OR_ANDNOT);
          }
          const __m512i front = _mm512_or_si512(both[0], _mm512_slli_epi32(both[1], 16));
          const __m512i back = _mm512_or_si512(both[2], _mm512_slli_epi32(both[3], 16));
          const auto bytes = [&](const uint8_t* at) {
            return _mm512_permutex2var_epi8(front, _mm512_load_si512(at), back);
          };
          _mm512_store_si512(to[word].low[pair][half], bytes(LOW_BYTES.at));
          _mm512_store_si512(to[word].high[pair][half], bytes(HIGH_BYTES.at));
        }
      }
  }

  using Sums = __m512i[SIDES][PAIRS];  // of a tile's outputs

  /* Adds what `bits` pick of a word's sums, which are loaded once for all outputs. */
  __attribute__((always_inline)) static void add(Sums& sums, const Bits (&bits)[SIDES], const Table& from, __m512i ones,
                                                 __m512i minus) {
#pragma GCC unroll 2
    for (int pair = 0; pair < PAIRS; pair++) {
      __m512i low[2], high[2];
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        low[half] = _mm512_load_si512(from.low[pair][half]), high[half] = _mm512_load_si512(from.high[pair][half]);
        asm("" : "+v"(low[half]), "+v"(high[half]));  // or gcc loads them again for each register of outputs
      }
#pragma GCC unroll 2
      for (int side = 0; side < SIDES; side++) {
        const auto pick = [&](int half, __m512i bytes) __attribute__((always_inline)) {
          return _mm512_permutexvar_epi8(bits[side].of[half], bytes);
        };
        __m512i& sum = sums[side][pair];
        sum = _mm512_dpbusd_epi32(sum, _mm512_add_epi8(pick(0, low[0]), pick(1, low[1])), ones);
        sum = _mm512_dpbusd_epi32(sum, pick(0, high[0]), minus);
        sum = _mm512_dpbusd_epi32(sum, pick(1, high[1]), minus);
      }
    }
  }

  void tile(const TileGroup<PLANES>& tile, int tokens, float* y) const {
    int token = 0;
    if (PAIRS == 1)
      for (; token + 2 <= tokens; token += 2) accumulate<2>(tile, token, y);
    for (; token < tokens; token++) accumulate<1>(tile, token, y);
  }

  /* Adds the products of COUNT tokens from `first` to y. */
  template <int COUNT>
  __attribute__((noinline)) void accumulate(const TileGroup<PLANES>& tile, int first, float* y) const {
    constexpr int STORED_PLANES = PLANES - TRELLIS;
    const __m512i fours = _mm512_set1_epi32(four), places = _mm512_set1_epi32(place);
    const __m512i ones = _mm512_set1_epi32(one), minus = _mm512_set1_epi32(minus_128);
    Sums sums[COUNT][PLANES];
#pragma GCC unroll 64
    for (int i = 0; i < COUNT * PLANES * SIDES * PAIRS; i++) {
      const int token = i / (PLANES * SIDES * PAIRS), p = i / (SIDES * PAIRS) % PLANES, pair = i % PAIRS;
      sums[token][p][i / PAIRS % SIDES][pair] = _mm512_set1_epi32(start[first + token][TRELLIS && p == 0][pair]);
    }
    for (int word = 0; word < tile.words; word++)
#pragma GCC unroll 4
      for (int p = 0; p < STORED_PLANES; p++) {
        const int64_t at = (word * STORED_PLANES + p) * TILE;
        __m512i words[SIDES];
        Bits bits[SIDES];
#pragma GCC unroll 2
        for (int side = 0; side < SIDES; side++) {
          words[side] = _mm512_loadu_si512(tile.planes + at + side * LANES);
          fetch(tile.ahead + at + side * LANES);
          bits[side] = Bits(words[side], fours, places);
        }
        const bool coded = TRELLIS && p == 0;
#pragma GCC unroll 2
        for (int token = 0; token < COUNT; token++)
          add(sums[token][p ? p + TRELLIS : 0], bits, table[first + token][coded][word], ones, minus);
        if (!coded) continue;
#pragma GCC unroll 2
        for (int side = 0; side < SIDES; side++)
          bits[side] = Bits(_mm512_xor_si512(words[side], _mm512_slli_epi32(words[side], 2)), fours, places);
#pragma GCC unroll 2
        for (int token = 0; token < COUNT; token++) add(sums[token][1], bits, table[first + token][0][word], ones, minus);
      }
    y += first * TILE;
#pragma GCC unroll 8
    for (int i = 0; i < COUNT * SIDES; i++) {
      const int token = i / SIDES, side = i % SIDES;
      float* out = y + token * TILE + side * LANES;
      Floats result = {};
#pragma GCC unroll 4
      for (int p = 0; p < PLANES; p++) result += tile.c[side].of[p] * floats(sums[token][p][side]);
      result = result * unit[first + token] + (load<Floats>(out) + tile.c[side].of[PLANES] * total[first + token]);
      memcpy(out, &result, sizeof result);
    }
  }

  __attribute__((always_inline)) static Floats floats(const __m512i (&pairs)[PAIRS]) {
    const Floats low = (Floats)_mm512_cvtepi32_ps(pairs[0]);
    if constexpr (PAIRS == 1) return low;
    return low + (Floats)_mm512_cvtepi32_ps(pairs[PAIRS - 1]) * (float)(1 << DIGITS);
  }
};

}  // namespace
#endif

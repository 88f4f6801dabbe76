/* X^T H X of rows' bit-planes (equations.py). */

#pragma once

#include "cpu_solver_tiles.h"

namespace {

/* Products of H with rows' bit-planes are sums of few rows of H, looked up.

   A part is up to 32 inputs of one group. Of up to two parts, 16 columns of H's rows become 16 tables, each of the 16
   sums of 4 of those rows, small enough for the nearest cache; of each the planes' words pick one sum:

       words of a row  1011 0010 ... 0111 | 0011 ... 1110
                         |    |         |      |        |     + the entries = H X of this row and plane in 16 columns
                       tables of 16 x 16 floats */
constexpr int WIDTH = 32, NIBBLE = 4, ENTRIES = 1 << NIBBLE, TABLES = 2 * WIDTH / NIBBLE;
constexpr int COLUMNS = 16, VECTORS = COLUMNS / LANES, BLOCKS = WIDTH / COLUMNS;  // columns of a table; of a part
constexpr int64_t ROWS = 256;  // whose sums stay in a near cache

struct Part {
  int group, start, count;
};

std::vector<Part> parts_of(int K, int group_size, int width) {
  std::vector<Part> parts;
  for (int start = 0; start < K; start += parts.back().count) {
    const int group = start / group_size, end = std::min(K, (group + 1) * group_size);
    parts.push_back({group, start, std::min(width, end - start)});
  }
  return parts;
}

/* Bit i of words[(part * N + n) * k + p]: plane p of the part's input i in row n. */
std::vector<uint32_t> words_of(const std::vector<Part>& parts, int k, int64_t N, const uint8_t* codes) {
  std::vector<uint32_t> words(parts.size() * k * N);
#pragma omp parallel for
  for (int64_t j = 0; j < (int64_t)parts.size(); ++j)
    for (int i = 0; i < parts[j].count; ++i) {
      uint32_t* word = words.data() + j * N * k;
      const uint8_t* code = codes + (int64_t)(parts[j].start + i) * N;
      for (int64_t n = 0; n < N; ++n)
        for (int p = 0; p < k; ++p) word[n * k + p] |= (uint32_t)(code[n] >> p & 1) << i;
    }
  return words;
}

struct Tables {
  std::vector<Floats> entries{(size_t)TABLES * ENTRIES * VECTORS};
  Floats all[VECTORS];  // the sum of all rows

  /* Of `rows` rows h [rows][VECTORS]. */
  void build(const Floats* h, int rows) {
    for (int v = 0; v < VECTORS; ++v) all[v] = Floats{};
    for (int t = 0; t < (rows + WIDTH - 1) / WIDTH * WIDTH; ++t) {
      Floats* table = entries.data() + t / NIBBLE * ENTRIES * VECTORS;
      const int bit = 1 << t % NIBBLE;
      for (int v = 0; v < VECTORS; ++v) {
        const Floats row = t < rows ? h[t * VECTORS + v] : Floats{};
        if (bit == 1) table[v] = Floats{};
        for (int e = 0; e < bit; ++e) table[(bit + e) * VECTORS + v] = table[e * VECTORS + v] + row;
        all[v] += row;
      }
    }
  }

  /* found += H X of the planes' words of one part, the first or the second of the tables'. */
  template <int k>
  inline __attribute__((always_inline)) void look_up(int part, const uint32_t* words, Floats (*found)[VECTORS]) const {
    const Floats* first = entries.data() + part * (TABLES / 2) * ENTRIES * VECTORS;
#pragma GCC unroll 8
    for (int b = 0; b < TABLES / 2; ++b)
      for (int p = 0; p < k; ++p) {
        const Floats* entry = first + (b * ENTRIES + (words[p] >> (b * NIBBLE) & (ENTRIES - 1))) * VECTORS;
        for (int v = 0; v < VECTORS; ++v) found[p][v] += entry[v];
      }
  }
};

#if defined(__AVX512F__)
typedef __mmask16 Lanes;
inline Lanes lanes_of(uint32_t bits) { return (Lanes)bits; }
inline Floats plus_where(Lanes lanes, Floats sum, Floats x) {
  return (Floats)_mm512_mask_add_ps((__m512)sum, lanes, (__m512)sum, (__m512)x);
}
#else
typedef Ints Lanes;  // all ones, or zero
inline Lanes lanes_of(uint32_t bits) {
  Ints lane;
  for (int i = 0; i < LANES; ++i) lane[i] = 1 << i;
  return ((Ints{} + (int32_t)bits) & lane) == lane;
}
inline Floats plus_where(Lanes lanes, Floats sum, Floats x) { return sum + (Floats)((Ints)x & lanes); }
#endif

/* Lane i: the sum of the lanes of x[i * stride]. */
inline Floats lane_sums(const Floats* x, size_t stride) {
#if defined(__AVX512F__)
  __m512 sums[LANES];
  for (int i = 0; i < LANES; ++i) sums[i] = (__m512)x[i * stride];
  for (int i = 0; i < 8; ++i)
    sums[i] = _mm512_add_ps(_mm512_unpacklo_ps(sums[2 * i], sums[2 * i + 1]),
                            _mm512_unpackhi_ps(sums[2 * i], sums[2 * i + 1]));
  for (int i = 0; i < 4; ++i) {
    const __m512d one = _mm512_castps_pd(sums[2 * i]), other = _mm512_castps_pd(sums[2 * i + 1]);
    sums[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(one, other)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(one, other)));
  }
  for (int count = 2; count > 0; --count)
    for (int i = 0; i < count; ++i)
      sums[i] = _mm512_add_ps(_mm512_shuffle_f32x4(sums[2 * i], sums[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(sums[2 * i], sums[2 * i + 1], 0xdd));
  return (Floats)sums[0];
#else
  Floats sums;
  for (int i = 0; i < LANES; ++i) sums[i] = sum(x[i * stride]);
  return sums;
#endif
}

/* Up to two parts of a group, from the number of the first. */
struct Pair {
  int part, parts, group, start, count;
};

std::vector<Pair> pairs_of(const std::vector<Part>& parts) {
  std::vector<Pair> pairs;
  for (int i = 0; i < (int)parts.size(); ++i) {
    const bool joins = !pairs.empty() && pairs.back().group == parts[i].group && pairs.back().parts == 1;
    if (!joins) pairs.push_back({i, 0, parts[i].group, parts[i].start, 0});
    ++pairs.back().parts;
    pairs.back().count += parts[i].count;
  }
  return pairs;
}

/* What X^T H X of N rows is found from. */
struct Quadratic {
  const int group_size, K;
  const int64_t N;
  const float* H;
  const std::vector<Part> parts;
  const std::vector<Pair> pairs;
  const std::vector<uint32_t> words;

  Quadratic(int group_size, int K, int64_t N, int k, const uint8_t* codes, const float* H)
      : group_size(group_size), K(K), N(N), H(H), parts(parts_of(K, group_size, WIDTH)), pairs(pairs_of(parts)),
        words(words_of(parts, k, N, codes)) {}
};

/* X^T H X of a group with itself and those before. */
template <int k>
struct Products {
  /* Of a row: of the other group's planes and ones (p) in the one's (q), lane sums not yet added. */
  struct Sums {
    Floats of[k + 1][k + 1];

    /* HX in a block of H's columns, which has `one`'s bits from `shift` on. */
    inline __attribute__((always_inline)) void add(const Floats (*HX)[VECTORS], const uint32_t* one, int shift) {
      for (int v = 0; v < VECTORS; ++v) {
        for (int q = 0; q < k; ++q) {
          const Lanes lanes = lanes_of(one[q] >> (shift + v * LANES));
          for (int p = 0; p <= k; ++p) of[p][q] = plus_where(lanes, of[p][q], HX[p][v]);
        }
        for (int p = 0; p <= k; ++p) of[p][k] += HX[p][v];
      }
    }
  };

  static constexpr int SIZE = k + 1;
  const Quadratic& of;
  std::vector<Floats> columns;  // of H, the group's: [blocks, K, VECTORS]
  std::vector<Sums> sums;  // zeros between two pairs of groups
  Tables tables;

  explicit Products(const Quadratic& of)
      : of(of), columns((size_t)(of.group_size + WIDTH - 1) / WIDTH * BLOCKS * of.K * VECTORS), sums(ROWS, Sums{}) {}

  Floats* block(int number) { return columns.data() + (size_t)number * of.K * VECTORS; }

  /* A: for each tile of rows as `Cholesky` has it, n wide. */
  void run(int one, int n, Floats* A) {
    size_t first = 0;
    while (of.parts[first].group != one) ++first;
    copy_columns(first);
    for (int64_t start = 0; start < of.N; start += ROWS) {
      const int64_t rows = std::min(ROWS, of.N - start);
      for (size_t j = 0; j < of.pairs.size() && of.pairs[j].group <= one; ++j) {
        add(first, of.pairs[j], start, rows);
        const int other = of.pairs[j].group;
        if (j + 1 < of.pairs.size() && of.pairs[j + 1].group == other) continue;
        for (int64_t row = 0; row < rows; row += LANES) {
          Floats* to = A + (start + row) / LANES * n * n + (one * n + other * SIZE) * SIZE;
          for (int p = 0; p < SIZE; ++p)
            for (int q = 0; q < SIZE; ++q) to[p * SIZE + q] = lane_sums(&sums[row].of[p][q], SIZE * SIZE);
        }
        std::fill(sums.begin(), sums.end(), Sums{});
      }
    }
  }

  /* Of the group whose first part is `first`, as far as its own end. */
  void copy_columns(size_t first) {
    size_t end = first;
    while (end < of.parts.size() && of.parts[end].group == of.parts[first].group) ++end;
    const int rows = of.parts[end - 1].start + of.parts[end - 1].count;
    for (int t = 0; t < rows; ++t)
      for (size_t i = first; i < end; ++i) {
        const float* h = of.H + (int64_t)t * of.K + of.parts[i].start;
        for (int at = 0; at < WIDTH; at += LANES)
          block((i - first) * BLOCKS + at / COLUMNS)[t * VECTORS + at % COLUMNS / LANES] =
              first_of(h + at, of.parts[i].count - at);
      }
  }

  /* To the sums of rows from `start`: the products of a pair of parts with all parts of the group. */
  void add(size_t first, const Pair& pair, int64_t start, int64_t rows) {
    for (size_t i = first; i < of.parts.size() && of.parts[i].group == of.parts[first].group; ++i)
      for (int b = 0; b < BLOCKS && b * COLUMNS < of.parts[i].count; ++b) {
        tables.build(block((i - first) * BLOCKS + b) + pair.start * VECTORS, pair.count);
        const uint32_t* at = of.words.data() + (i * of.N + start) * k;
        const uint32_t* to = of.words.data() + (pair.part * of.N + start) * k;
        for (int64_t row = 0; row < rows; ++row, at += k, to += k) {
          Floats HX[k + 1][VECTORS] = {};
          tables.look_up<k>(0, to, HX);
          if (pair.parts == 2) tables.look_up<k>(1, to + of.N * k, HX);
          for (int v = 0; v < VECTORS; ++v) HX[k][v] = tables.all[v];
          sums[row].add(HX, at, b * COLUMNS);
        }
      }
  }
};

}  // namespace

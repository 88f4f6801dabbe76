/* Sums over tokens of products of two inputs in bf16, S += alpha a^T b, for CPUs that multiply pairs of bf16
   (AVX512_BF16): twice the products of fp32 a cycle. hessian.py says what they are for.

   Pairs of tokens of an input lie in one lane; 48 inputs are a panel, which stays in a near cache while strips of 8
   inputs of the other matrix pass it, and the sums of a tile in 24 registers:

                       panel of b: 3 registers of 16 inputs
                      .---------------.---------------.---------------.
     token pair t     | (2t, 2t+1) ... 16 inputs ...  |               |      t = 0 .. 511, one after the other
                      '---------------'---------------'---------------'
     strip of a       .---------------.---------------.---------------.
      input i: (2t,   | sums of i     |               |               |  8 rows
       2t+1) in all   |  with 16 of b |               |               |
       lanes          '---------------'---------------'---------------'

   A tile's sums run over tokens in order, so that no result depends on the number of threads. */

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr int LANES = 16, VECTORS = 3, PANEL = VECTORS * LANES, STRIP = 8;
constexpr int64_t TOKENS = 1024;  // whose panels are in the caches at once

using Pairs = std::vector<uint32_t>;  // [ceil(K / PANEL)][pairs][PANEL]

/* 16 inputs of a token, in the lower halves of lanes, with zeros behind the first `count`. */
inline __m512i load(const uint16_t* x, int64_t count) {
  const __mmask16 here = count <= 0 ? 0 : count >= LANES ? 0xffff : (1u << count) - 1;
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(here, x));
}

/* `tokens` rows of x [., K], with zeros behind the last input and the last token. */
void pack(const uint16_t* x, int64_t tokens, int64_t K, Pairs& packed) {
  const int64_t panels = (K + PANEL - 1) / PANEL, pairs = (tokens + 1) / 2;
  packed.resize(panels * pairs * PANEL);
#pragma omp parallel for
  for (int64_t t = 0; t < pairs; ++t)
    for (int64_t first = 0; first < panels * PANEL; first += LANES) {
      const uint16_t* even = x + 2 * t * K + first;
      const int64_t count = K - first;
      const __m512i low = load(even, count), high = load(even + K, 2 * t + 1 < tokens ? count : 0);
      uint32_t* lanes = packed.data() + (first / PANEL * pairs + t) * PANEL + first % PANEL;
      _mm512_storeu_si512(lanes, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

/* S [rows, columns] += alpha a^T b, S in rows of N, for a strip and a panel of so many pairs. */
void add_tile(const uint32_t* a, const uint32_t* b, int64_t pairs, float alpha, float* S, int64_t N, int rows,
              int columns) {
  __m512 sums[STRIP][VECTORS];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < pairs; ++t, a += PANEL, b += PANEL) {
    __m512bh y[VECTORS];
    for (int v = 0; v < VECTORS; ++v) y[v] = (__m512bh)_mm512_loadu_si512(b + v * LANES);
    for (int i = 0; i < STRIP; ++i) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(a[i]);
      for (int v = 0; v < VECTORS; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], x, y[v]);
    }
  }
  for (int i = 0; i < rows; ++i)
    for (int v = 0; v < VECTORS; ++v) {
      const int left = std::clamp(columns - v * LANES, 0, LANES);
      const __mmask16 here = (1u << left) - 1;
      float* row = S + i * N + v * LANES;
      const __m512 before = _mm512_maskz_loadu_ps(here, row);
      _mm512_mask_storeu_ps(row, here, _mm512_fmadd_ps(_mm512_set1_ps(alpha), sums[i][v], before));
    }
}

}  // namespace

extern "C" {

/* S [M, N] fp32 += alpha a^T b for bf16 a [T, M] and b [T, N]; all are contiguous. If a is b, what is above the
   diagonal may be left as it is. */
void bpdq_add_products(int64_t T, int64_t M, int64_t N, const uint16_t* a, const uint16_t* b, float alpha, float* S) {
  const int64_t panels = (N + PANEL - 1) / PANEL, strips = (M + STRIP - 1) / STRIP, in_panel = PANEL / STRIP;
  Pairs panels_a, panels_b;
  for (int64_t first = 0; first < T; first += TOKENS) {
    const int64_t tokens = std::min(TOKENS, T - first), pairs = (tokens + 1) / 2;
    pack(b + first * N, tokens, N, panels_b);
    if (a != b) pack(a + first * M, tokens, M, panels_a);
    const uint32_t *x = (a == b ? panels_b : panels_a).data(), *y = panels_b.data();
#pragma omp parallel for schedule(dynamic)
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t strip = a == b ? panel * in_panel : 0; strip < strips; ++strip)
        add_tile(x + strip / in_panel * pairs * PANEL + strip % in_panel * STRIP, y + panel * pairs * PANEL, pairs,
                 alpha, S + strip * STRIP * N + panel * PANEL, N, std::min<int64_t>(STRIP, M - strip * STRIP),
                 std::min<int64_t>(PANEL, N - panel * PANEL));
  }
}
}

/* The loops that quantizing spends its time in, compiled for the machine; grid.py, equations.py and refine.py say
   the same in torch and are what the tests compare with.

   Rows of a weight are independent of each other. A tile is as many rows as a register has lanes, and a group's tile
   stays in the nearest cache through all starts, k-means, iterations and fits:

               16 rows = one AVX-512 register
              .------.------.---   ---.------.
     input t  | row  | +1   |   ...   | +15  |      t = 0 .. g-1, one array for W, one for each V x plane, ...
              '------'------'---   ---'------'

   Products with [g, g] matrices take a block of inputs at once, whose sums stay in registers. Sums over inputs are in
   order, in fp32, so that no result depends on the number of threads or on a row's neighbours. */

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
constexpr int CLUSTER_ROUNDS = 5, INITIAL_BITS = 8;

/* Inputs whose sums for n features fit the registers beside their operands. */
constexpr int block_of(int n) { return n == 1 ? 8 : n == 2 ? REGISTERS / 4 : REGISTERS / 8; }
constexpr float CLUSTER_ALPHA = 1e-6f;

enum Dtype { FLOAT32, FLOAT16, BFLOAT16 };
enum Start { PAPER, RANGE, RESIDUAL };

inline bool any(Ints mask) {
  int32_t found = 0;
  for (int i = 0; i < LANES; ++i) found |= mask[i];
  return found != 0;
}

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
  static constexpr int COUNT = 1 << k;
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

/* Column after column: e[t] = error(t, w, nearest level of w), where w = base[t] - sum over j < t of S[j][t] e[j].
   S: [g, g], row-major. Returns the lanes in which a code changed. */
template <int k, class Error>
Ints sweep(const Levels<k>& levels, const Floats* base, const float* S, int g, Ints* codes, Floats* e, Error error) {
  Ints moved{};
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
      moved |= code != codes[t];
      codes[t] = code;
      e[t] = error(t, w[i], level);
      for (int later = i + 1; later < count; ++later) w[later] -= S[(int64_t)t * g + first + later] * e[t];
    }
  }
  return moved;
}

inline Floats plane(Ints code, int p) { return (Floats)(-(code >> p & 1) & 0x3f800000); }

/* Normal equations of a row's k+1 coefficients. */
template <int k>
struct Fit {
  Floats gram[k + 1][k + 1] = {}, target[k + 1] = {};

  /* An equation: features x (the bias' last) and value y. */
  inline void add(const Floats* x, Floats y) {
    for (int p = 0; p <= k; ++p) {
      target[p] += x[p] * y;
      for (int q = 0; q <= p; ++q) gram[p][q] += x[p] * x[q];
    }
  }

  /* Coefficients of the ridge least squares, by LDL^T; alpha: share of the mean of the diagonal. */
  void solve(float alpha, Dtype dtype, Floats* c) {
    Floats mean{};
    for (int p = 0; p <= k; ++p) mean += gram[p][p];
    for (int p = 0; p <= k; ++p) gram[p][p] += alpha / (k + 1) * mean;
    for (int p = 0; p <= k; ++p) {
      for (int q = 0; q < p; ++q) {
        Floats factor = gram[p][q] / gram[q][q];
        for (int r = p; r <= k; ++r) gram[r][p] -= factor * gram[r][q];
        target[p] -= factor * target[q];
      }
    }
    for (int p = k; p >= 0; --p) {
      c[p] = target[p];
      for (int q = p + 1; q <= k; ++q) c[p] -= gram[q][p] * c[q];
      c[p] /= gram[p][p];
    }
    for (int p = 0; p <= k; ++p) c[p] = rounded(c[p], dtype);
  }
};

/* What a group's rows share. spread: U / diag(U); whiten: U^-1, whose transpose is V; ones: V 1; [g, g] row-major. */
struct Group {
  int g, iterations;
  float alpha;
  Dtype dtype;
  const float *spread, *whiten, *ones, *weight;
};

template <int k>
struct Tile {
  const Group& group;
  const int g;
  std::vector<Floats> W, VW, VX, e, best_E;
  std::vector<Ints> codes, best_codes;
  Floats best_c[k + 1], best_loss;

  explicit Tile(const Group& group)
      : group(group), g(group.g), W(g), VW(g), VX(g * k), e(g), best_E(g), codes(g), best_codes(g) {}

  /* k-means from `codes` on bit-plane grids; errors weigh 1 / U[t, t]^2, none propagates. */
  void cluster() {
    for (int round = 0; round < CLUSTER_ROUNDS; ++round) {
      Fit<k> fit;
      for (int t = 0; t < g; ++t) {
        const float weight = group.weight[t];
        Floats x[k + 1];
        for (int p = 0; p < k; ++p) x[p] = plane(codes[t], p) * weight;
        x[k] = Floats{} + weight;
        fit.add(x, W[t] * weight);
      }
      Floats c[k + 1];
      fit.solve(CLUSTER_ALPHA, FLOAT32, c);
      Levels<k> levels(c);
      for (int t = 0; t < g; ++t) levels.nearest(W[t], codes[t]);
    }
  }

  /* The k most significant bits of an 8-bit min-max grid that contains zero; spread: of the range. */
  void range_planes(float spread) {
    Floats low{}, high{};
    for (int t = 0; t < g; ++t) {
      low = W[t] < low ? W[t] : low;
      high = W[t] > high ? W[t] : high;
    }
    low *= spread;
    high *= spread;
    constexpr float steps = (1 << INITIAL_BITS) - 1;
    Floats scale = (high - low) / steps;
    const Floats tiny = Floats{} + std::numeric_limits<float>::min();
    scale = scale > tiny ? scale : tiny;
    const Floats zero = round_even(-low / scale);
    for (int t = 0; t < g; ++t) {
      Floats q = round_even(W[t] / scale) + zero;
      q = q > 0 ? q : Floats{};
      q = q < steps ? q : Floats{} + steps;
      codes[t] = __builtin_convertvector(q, Ints) >> (INITIAL_BITS - k);
    }
  }

  /* Signs of W - mean, then of what each sign times its mean leaves. */
  void residual_planes() {
    Floats mean{};
    for (int t = 0; t < g; ++t) mean += W[t];
    mean /= (float)g;
    for (int t = 0; t < g; ++t) {
      e[t] = W[t] - mean;
      codes[t] = Ints{};
    }
    for (int p = k - 1; p >= 0; --p) {
      Floats scale{};
      for (int t = 0; t < g; ++t) scale += e[t] < 0 ? -e[t] : e[t];
      scale /= (float)g;
      for (int t = 0; t < g; ++t) {
        Ints positive = e[t] > 0;
        codes[t] |= positive & (1 << p);
        e[t] -= positive ? scale : -scale;
      }
    }
  }

  /* y = V x for x [g] of each of n arrays; V is lower triangular. */
  template <int n, class X>
  inline void product(int first, int count, Floats (*sums)[n], X x) {
    constexpr int BLOCK = block_of(n);
    for (int i = 0; i < count; ++i)
      for (int p = 0; p < n; ++p) sums[i][p] = Floats{};
    const auto add = [&](int j, int i) __attribute__((always_inline)) {
      for (int p = 0; p < n; ++p) sums[i][p] += group.whiten[(int64_t)j * g + first + i] * x(j, p);
    };
    if (count == BLOCK)
      for (int j = 0; j < first; ++j)
        for (int i = 0; i < BLOCK; ++i) add(j, i);
    else
      for (int j = 0; j < first; ++j)
        for (int i = 0; i < count; ++i) add(j, i);
    for (int i = 0; i < count; ++i)
      for (int j = first; j <= first + i; ++j) add(j, i);
  }

  void whiten_weights() {
    constexpr int BLOCK = block_of(1);
    for (int first = 0; first < g; first += BLOCK) {
      const int count = std::min(BLOCK, g - first);
      Floats sums[BLOCK][1];
      product<1>(first, count, sums, [&](int j, int) { return W[j]; });
      for (int i = 0; i < count; ++i) VW[first + i] = sums[i][0];
    }
  }

  /* Coefficients of `codes` in H's metric; leaves VX for `loss`. */
  void fit(Floats* c) {
    constexpr int BLOCK = block_of(k);
    Fit<k> fit;
    for (int first = 0; first < g; first += BLOCK) {
      const int count = std::min(BLOCK, g - first);
      Floats sums[BLOCK][k];
      product<k>(first, count, sums, [&](int j, int p) { return plane(codes[j], p); });
      for (int i = 0; i < count; ++i) {
        Floats x[k + 1];
        for (int p = 0; p < k; ++p) VX[(first + i) * k + p] = x[p] = sums[i][p];
        x[k] = Floats{} + group.ones[first + i];
        fit.add(x, VW[first + i]);
      }
    }
    fit.solve(group.alpha, group.dtype, c);
  }

  /* E = V (W - W_hat) of input t. */
  inline Floats error(int t, const Floats* c) const {
    Floats left = VW[t] - group.ones[t] * c[k];
    for (int p = 0; p < k; ++p) left -= c[p] * VX[t * k + p];
    return left;
  }

  void keep_better(const Floats* c) {
    Floats loss{};
    for (int t = 0; t < g; ++t) {
      Floats left = error(t, c);
      loss += left * left;
    }
    const Ints better = loss < best_loss;
    if (!any(better)) return;
    best_loss = better ? loss : best_loss;
    for (int p = 0; p <= k; ++p) best_c[p] = better ? c[p] : best_c[p];
    for (int t = 0; t < g; ++t) {
      best_codes[t] = better ? codes[t] : best_codes[t];
      best_E[t] = better ? error(t, c) : best_E[t];
    }
  }

  void run(const Start* starts, int count) {
    whiten_weights();
    best_loss = Floats{} + std::numeric_limits<float>::infinity();
    for (int p = 0; p <= k; ++p) best_c[p] = Floats{} + std::numeric_limits<float>::quiet_NaN();  // if no loss is finite
    std::fill(best_codes.begin(), best_codes.end(), Ints{});
    std::fill(best_E.begin(), best_E.end(), Floats{});
    for (int s = 0; s < count; ++s) {
      if (starts[s] == RESIDUAL)
        residual_planes();
      else
        range_planes(starts[s] == RANGE && k == 2 ? 0.8f : 1.0f);
      if (starts[s] != PAPER) cluster();
      Floats c[k + 1];
      fit(c);
      for (int i = 0; i < group.iterations; ++i) {
        const Ints moved = sweep<k>(Levels<k>(c), W.data(), group.spread, g, codes.data(), e.data(),
                                    [](int, Floats w, Floats level) { return w - level; });
        fit(c);
        keep_better(c);
        if (!any(moved)) break;
      }
    }
  }
};

template <class T, class V>
inline void load(V& to, const T* from, int lanes) {
  to = V{};
  for (int i = 0; i < lanes; ++i) to[i] = from[i];
}

template <class T, class V>
inline void store(T* to, const V& from, int lanes) {
  for (int i = 0; i < lanes; ++i) to[i] = (T)from[i];
}

template <int k>
void quantize_group(const Group& group, const float* W, int64_t N, const Start* starts, int count, uint8_t* codes,
                    float* c, float* E) {
#pragma omp parallel
  {
    Tile<k> tile(group);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, N - first);
      for (int t = 0; t < group.g; ++t) load(tile.W[t], W + t * N + first, lanes);
      tile.run(starts, count);
      for (int t = 0; t < group.g; ++t) {
        store(codes + t * N + first, tile.best_codes[t], lanes);
        store(E + t * N + first, tile.best_E[t], lanes);
      }
      for (int p = 0; p <= k; ++p) store(c + p * N + first, tile.best_c[p], lanes);
    }
  }
}

/* The refinement: products of H with rows' bit-planes are sums of few rows of H, looked up.

   A part is up to 32 inputs of one group. Of two parts, H's block [32 x 32] becomes 8 tables, each of the 16 sums of
   the same 4 rows, small enough for the nearest cache; a plane's word then picks one sum of each:

       word of a row   1011 0010 ... 0111
                         |    |         |      + the entries = H X of this row and plane, [32]
                       tables of 16 x 32 floats */
constexpr int WIDTH = 32, VECTORS = WIDTH / LANES, NIBBLE = 4, ENTRIES = 1 << NIBBLE, TABLES = WIDTH / NIBBLE;

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

struct Tables {
  std::vector<Floats> entries{(size_t)TABLES * ENTRIES * VECTORS};
  Floats all[VECTORS];  // the sum of all rows

  void build(const float* H, int K, const Part& rows, const Part& columns) {
    for (int v = 0; v < VECTORS; ++v) all[v] = Floats{};
    for (int t = 0; t < WIDTH; ++t) {
      const float* h = H + (int64_t)(rows.start + t) * K + columns.start;
      Floats* table = entries.data() + t / NIBBLE * ENTRIES * VECTORS;
      const int bit = 1 << t % NIBBLE;
      for (int v = 0; v < VECTORS; ++v) {
        const Floats row = t < rows.count ? first_of(h + v * LANES, columns.count - v * LANES) : Floats{};
        if (bit == 1) table[v] = Floats{};
        for (int e = 0; e < bit; ++e) table[(bit + e) * VECTORS + v] = table[e * VECTORS + v] + row;
        all[v] += row;
      }
    }
  }

  /* H X of the planes' words. */
  template <int k>
  inline __attribute__((always_inline)) void look_up(const uint32_t* words, Floats (*found)[VECTORS]) const {
    for (int p = 0; p < k; ++p)
      for (int v = 0; v < VECTORS; ++v) found[p][v] = entries[(words[p] & (ENTRIES - 1)) * VECTORS + v];
#pragma GCC unroll 8
    for (int b = 1; b < TABLES; ++b)
      for (int p = 0; p < k; ++p) {
        const Floats* entry =
            entries.data() + (b * ENTRIES + (words[p] >> (b * NIBBLE) & (ENTRIES - 1))) * VECTORS;
        for (int v = 0; v < VECTORS; ++v) found[p][v] += entry[v];
      }
  }
};

/* All ones in the lanes whose bits are set. */
inline Ints mask_of(uint32_t bits) {
  Ints lane;
  for (int i = 0; i < LANES; ++i) lane[i] = 1 << i;
  return ((Ints{} + (int32_t)bits) & lane) == lane;
}

/* X^T H X of two groups, lane sums not yet added: of the other's planes and ones (p) in the one's (q). */
template <int k>
struct Products {
  Floats sums[k + 1][k + 1];

  inline void add(const Tables& tables, const uint32_t* one, const uint32_t* other) {
    Floats HX[k + 1][VECTORS];
    tables.look_up<k>(other, HX);
    for (int v = 0; v < VECTORS; ++v) {
      HX[k][v] = tables.all[v];
      for (int q = 0; q < k; ++q) {
        const Ints mask = mask_of(one[q] >> (v * LANES));
        for (int p = 0; p <= k; ++p) sums[p][q] += (Floats)((Ints)HX[p][v] & mask);
      }
      for (int p = 0; p <= k; ++p) sums[p][k] += HX[p][v];
    }
  }
};

/* The rows and columns of group `one` with itself and those before: its A [N, k+1, n]. */
template <int k>
void add_equations(int one, const std::vector<Part>& parts, const std::vector<uint32_t>& words, int64_t N, int K, int n,
                   const float* H, float* A, Tables& tables, std::vector<Products<k>>& products) {
  for (size_t first = 0, end; first < parts.size() && parts[first].group <= one; first = end) {
    const int other = parts[first].group;
    std::fill(products.begin(), products.end(), Products<k>{});
    for (end = first; end < parts.size() && parts[end].group == other; ++end)
      for (size_t i = 0; i < parts.size(); ++i) {
        if (parts[i].group != one) continue;
        tables.build(H, K, parts[end], parts[i]);
        const uint32_t *at = words.data() + i * N * k, *to = words.data() + end * N * k;
        for (int64_t row = 0; row < N; ++row) products[row].add(tables, at + row * k, to + row * k);
      }
    for (int64_t row = 0; row < N; ++row)
      for (int q = 0; q <= k; ++q)
        for (int p = 0; p <= k; ++p)
          A[(row * (k + 1) + q) * n + other * (k + 1) + p] = sum(products[row].sums[p][q]);
  }
}

/* A [groups, N, k+1, n] = X^T H X, the lower triangle's blocks. */
template <int k>
void normal_equations(int group_size, int K, int64_t N, const uint8_t* codes, const float* H, float* A) {
  const std::vector<Part> parts = parts_of(K, group_size, WIDTH);
  const std::vector<uint32_t> words = words_of(parts, k, N, codes);
  const int groups = (K + group_size - 1) / group_size, n = groups * (k + 1);
#pragma omp parallel
  {
    Tables tables;
    std::vector<Products<k>> products(N);
#pragma omp for schedule(dynamic)
    for (int last = 0; last < groups; ++last)
      add_equations<k>(groups - 1 - last, parts, words, N, K, n, H, A + (groups - 1 - last) * N * (k + 1) * n, tables,
                       products);
  }
}

/* Cholesky factorization and solution of a tile of rows' equations, in blocks [k+1, k+1] that stay in registers. */
template <int k>
struct Cholesky {
  static constexpr int SIZE = k + 1, BAND = 8;  // rows of blocks that stay in a near cache
  const int blocks, n;
  std::vector<Floats> L;  // [blocks, n, SIZE]: rows of a block beside each other
  std::vector<Floats> inverse, x;

  explicit Cholesky(int groups) : blocks(groups), n(groups * SIZE), L((size_t)n * n), inverse(n), x(n) {}

  Floats* row(int i) { return L.data() + (size_t)i * n * SIZE; }

  /* A [blocks, N, SIZE, n] of rows from `first`; returns the lanes whose matrices are not positive definite. */
  Ints factorize(const float* A, int64_t N, int64_t first, int lanes, float alpha) {
    Floats mean{};
    for (int i = 0; i < blocks; ++i)
      for (int lane = 0; lane < lanes; ++lane) {
        const float* a = A + ((int64_t)i * N + first + lane) * SIZE * n;
        for (int q = 0; q < SIZE; ++q) mean[lane] += a[q * n + i * SIZE + q] / n;
        for (int q = 0; q < SIZE; ++q)
          for (int m = 0; m < (i + 1) * SIZE; ++m) row(i)[m * SIZE + q][lane] = a[q * n + m];
      }
    Ints failed{};
    for (int i = 0; i < blocks; ++i)
      for (int q = 0; q < SIZE; ++q) row(i)[(i * SIZE + q) * SIZE + q] += alpha * mean;
    for (int first_row = 0; first_row < blocks; first_row += BAND) {
      const int end = std::min(blocks, first_row + BAND);
      for (int j = 0; j < end; ++j)
        for (int i = std::max(j, first_row); i < end; ++i) failed |= block(i, j);
    }
    return failed;
  }

  inline Ints block(int i, int j) {
    Floats *to = row(i) + j * SIZE * SIZE, left[SIZE][SIZE];
    const Floats *one = row(i), *other = row(j), *corner = row(j) + j * SIZE * SIZE;
    for (int p = 0; p < SIZE; ++p)
      for (int q = 0; q < SIZE; ++q) left[p][q] = to[p * SIZE + q];
    for (int m = 0; m < j * SIZE; ++m, one += SIZE, other += SIZE)
      for (int p = 0; p < SIZE; ++p)
        for (int q = 0; q < SIZE; ++q) left[p][q] -= one[q] * other[p];
    Ints failed{};
    for (int p = 0; p < SIZE; ++p) {
      for (int r = 0; r < p; ++r)
        for (int q = 0; q < SIZE; ++q) left[p][q] -= left[r][q] * (i == j ? left[r][p] : corner[r * SIZE + p]);
      if (i == j) {
        failed |= ~(left[p][p] > 0);
        for (int lane = 0; lane < LANES; ++lane) inverse[j * SIZE + p][lane] = 1 / std::sqrt(left[p][p][lane]);
      }
      for (int q = 0; q < SIZE; ++q) to[p * SIZE + q] = left[p][q] *= inverse[j * SIZE + p];
    }
    return failed;
  }

  /* x: the right sides, then the solutions. */
  void solve() {
    for (int m = 0; m < n; ++m) {
      const Floats* l = row(m / SIZE) + m % SIZE;
      for (int j = 0; j < m; ++j) x[m] -= l[j * SIZE] * x[j];
      x[m] *= inverse[m];
    }
    for (int m = n - 1; m >= 0; --m) {
      const Floats* l = row(m / SIZE) + m % SIZE;
      x[m] *= inverse[m];
      for (int j = 0; j < m; ++j) x[j] -= l[j * SIZE] * x[m];
    }
  }
};

template <int k>
void solve_jointly(int group_size, int K, int64_t N, const uint8_t* codes, const float* H, const float* b, float alpha,
                   float* c) {
  const int groups = (K + group_size - 1) / group_size, n = groups * (k + 1);
  const std::unique_ptr<float[]> A(new float[(size_t)N * n * n]);  // not initialized: half of it is never touched
  normal_equations<k>(group_size, K, N, codes, H, A.get());
#pragma omp parallel
  {
    Cholesky<k> equations(groups);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, N - first);
      const Ints failed = equations.factorize(A.get(), N, first, lanes, alpha);
      for (int m = 0; m < n; ++m) load(equations.x[m], b + m * N + first, lanes);
      equations.solve();
      for (int m = 0; m < n; ++m)
        store(c + m * N + first, failed ? Floats{} + std::numeric_limits<float>::quiet_NaN() : equations.x[m], lanes);
    }
  }
}

struct Change {
  int input;
  float by;
};

/* Descent over whole rows. What changes is listed for each row, and the gradient in a block's inputs is what it was at
   first less the products of H with the row's changes so far. */
template <int k, int WIDE>
struct Descent {
  static constexpr int WIDES = WIDE / LANES;
  const int K, group_size;
  const int64_t N;
  const float *H, *V, *c;
  uint8_t* codes;
  float* gain;
  const std::vector<Part> parts;
  std::vector<float> diagonal;
  std::vector<std::vector<Change>> changes;
  std::vector<Floats> panels;  // H [K, inputs] of the parts of a group
  std::vector<float> S;        // H / diag(H) of a group

  Descent(int K, int group_size, int64_t N, const float* H, const float* V, const float* c, uint8_t* codes, float* gain)
      : K(K), group_size(group_size), N(N), H(H), V(V), c(c), codes(codes), gain(gain),
        parts(parts_of(K, group_size, WIDE)), diagonal(K), changes(N),
        panels((size_t)K * ((group_size + WIDE - 1) / WIDE) * WIDES), S((size_t)group_size * group_size) {
    for (int t = 0; t < K; ++t) diagonal[t] = H[(int64_t)t * (K + 1)];
  }

  const float* coefficient(int group, int p) const { return c + ((int64_t)group * (k + 1) + p) * N; }

  /* What all rows share in a sweep over the group whose first part is i; columns up to `known` have changes. */
  void prepare(int i, int known) {
    const int group = parts[i].group, start = parts[i].start, g = std::min(group_size, K - start);
#pragma omp for nowait
    for (int t = 0; t < known; ++t)
      for (int j = i; j < (int)parts.size() && parts[j].group == group; ++j) {
        Floats* to = panels.data() + ((int64_t)(j - i) * K + t) * WIDES;
        for (int v = 0; v < WIDES; ++v) to[v] = Floats{};
        memcpy(to, H + (int64_t)t * K + parts[j].start, sizeof(float) * parts[j].count);
      }
#pragma omp for
    for (int s = 0; s < g; ++s)
      for (int t = 0; t < g; ++t) S[(int64_t)s * g + t] = H[(int64_t)(start + s) * K + start + t] / diagonal[start + t];
  }

  /* Row n's gradient in the inputs of part i, now. */
  inline void current(int i, int64_t n, const Floats* panel, float* to) const {
    Floats v[WIDES];
    for (int j = 0; j < WIDES; ++j) v[j] = first_of(V + n * K + parts[i].start + j * LANES, parts[i].count - j * LANES);
    for (const Change& change : changes[n]) {
      const Floats* h = panel + (int64_t)change.input * WIDES;
      for (int j = 0; j < WIDES; ++j) v[j] -= change.by * h[j];
    }
    memcpy(to, v, sizeof v);
  }

  struct Scratch {
    std::vector<Floats> base, now, e;
    std::vector<Ints> old, found;
    explicit Scratch(int g) : base(g), now(g), e(g), old(g), found(g) {}
  };

  /* W_hat of a group's inputs from `start`, and their codes, in rows from `first`. */
  void stored(Scratch& at, const Floats* levels, int start, int g, int64_t first, int lanes) const {
    for (int t = 0; t < g; ++t) {
      load(at.old[t], codes + (int64_t)(start + t) * N + first, lanes);
      at.now[t] = levels[k];
      for (int p = 0; p < k; ++p) at.now[t] += plane(at.old[t], p) * levels[p];
    }
  }

  /* The group whose first part is i, in a tile of rows from `first`. */
  void sweep_tile(Scratch& at, int i, int64_t first) {
    const int lanes = (int)std::min<int64_t>(LANES, N - first), start = parts[i].start, group = parts[i].group;
    const int g = std::min(group_size, K - start);
    Floats levels[k + 1], won{};
    for (int p = 0; p <= k; ++p) load(levels[p], coefficient(group, p) + first, lanes);
    stored(at, levels, start, g, first, lanes);
    for (int j = i; j < (int)parts.size() && parts[j].group == group; ++j) {
      float gradients[LANES][WIDE] = {};
      for (int lane = 0; lane < lanes; ++lane)
        current(j, first + lane, panels.data() + (int64_t)(j - i) * K * WIDES, gradients[lane]);
      for (int t = 0; t < parts[j].count; ++t) {
        const int input = parts[j].start - start + t;
        Floats gradient;
        for (int lane = 0; lane < LANES; ++lane) gradient[lane] = gradients[lane][t];
        at.base[input] = at.now[input] + gradient / diagonal[start + input];
      }
    }
    std::copy(at.old.begin(), at.old.begin() + g, at.found.begin());
    sweep<k>(Levels<k>(levels), at.base.data(), S.data(), g, at.found.data(), at.e.data(),
             [&](int t, Floats w, Floats level) {
               const Floats change = level - at.now[t];
               won += diagonal[start + t] * change * (2 * (w - at.now[t]) - change);
               return change;
             });
    for (int lane = 0; lane < lanes; ++lane) gain[first + lane] += won[lane];
    for (int t = 0; t < g; ++t) {
      const Ints moved = at.found[t] != at.old[t];
      if (!any(moved)) continue;
      store(codes + (int64_t)(start + t) * N + first, at.found[t], lanes);
      for (int lane = 0; lane < lanes; ++lane)
        if (moved[lane]) changes[first + lane].push_back({start + t, at.e[t][lane]});
    }
  }

  void run(int sweeps) {
#pragma omp parallel
    {
      Scratch scratch(group_size);
      for (int s = 0; s < sweeps; ++s)
        for (int i = 0; i < (int)parts.size(); ++i) {
          if (i > 0 && parts[i].group == parts[i - 1].group) continue;
          prepare(i, s == 0 ? parts[i].start : K);
#pragma omp for schedule(dynamic)
          for (int64_t first = 0; first < N; first += LANES) sweep_tile(scratch, i, first);
        }
    }
  }
};

/* call(integral constants k, width) for k planes and groups of that size. */
template <class Call>
void with_sizes(int k, int group_size, Call call) {
  const auto widths = [&](auto planes) {
    if (group_size <= 32) call(planes, std::integral_constant<int, 32>());
    else call(planes, std::integral_constant<int, 64>());
  };
  if (k == 1) widths(std::integral_constant<int, 1>());
  else if (k == 2) widths(std::integral_constant<int, 2>());
  else if (k == 3) widths(std::integral_constant<int, 3>());
  else widths(std::integral_constant<int, 4>());
}

}  // namespace

extern "C" {

/* grid.quantize_group for W [g, N]; all arrays are contiguous. */
void bpdq_quantize_group(int g, int64_t N, int k, const float* W, const float* spread, const float* whiten,
                         const float* ones, const float* weight, int iterations, float alpha, int dtype,
                         const int* starts, int count, uint8_t* codes, float* c, float* E) {
  const Group group{g, iterations, alpha, (Dtype)dtype, spread, whiten, ones, weight};
  const auto run = k == 1 ? quantize_group<1> : k == 2 ? quantize_group<2> : k == 3 ? quantize_group<3> : quantize_group<4>;
  run(group, W, N, (const Start*)starts, count, codes, c, E);
}

/* refine.descend for `sweeps` sweeps: codes [K, N] in place, gain [N]: by how much the loss falls; V [N, K]: the gradient
   H (W - W_hat) of the codes that come, H [K, K] symmetric, c [ceil(K/G), k+1, N]; all arrays are contiguous. */
void bpdq_descend(int group_size, int K, int64_t N, int k, int sweeps, const float* V, const float* H, const float* c,
                  uint8_t* codes, float* gain) {
  std::fill(gain, gain + N, 0.0f);
  with_sizes(k, group_size, [&](auto planes, auto width) {
    Descent<planes, width>(K, group_size, N, H, V, c, codes, gain).run(sweeps);
  });
}

/* equations.solve_jointly: c [n, N] from codes [K, N], the symmetric H [K, K] and b [n, N]; all are contiguous. */
void bpdq_solve_jointly(int group_size, int K, int64_t N, int k, const uint8_t* codes, const float* H, const float* b,
                        float alpha, float* c) {
  const auto run = k == 1 ? solve_jointly<1> : k == 2 ? solve_jointly<2> : k == 3 ? solve_jointly<3> : solve_jointly<4>;
  run(group_size, K, N, codes, H, b, alpha, c);
}
}

/* The two loops over columns that quantizing spends its time in, compiled for the machine; grid.py and refine.py say
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

template <int k>
void descend_group(int g, int64_t N, const float* S, const float* inverse, const float* V, const float* c,
                   const float* W_hat, uint8_t* codes, float* change) {
#pragma omp parallel
  {
    std::vector<Floats> base(g), now(g), e(g);
    std::vector<Ints> found(g);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, N - first);
      Floats levels[k + 1];
      for (int p = 0; p <= k; ++p) load(levels[p], c + p * N + first, lanes);
      for (int t = 0; t < g; ++t) {
        Floats gradient;
        load(now[t], W_hat + t * N + first, lanes);
        load(gradient, V + t * N + first, lanes);
        base[t] = now[t] + gradient * inverse[t];
      }
      sweep<k>(Levels<k>(levels), base.data(), S, g, found.data(), e.data(),
               [&](int t, Floats, Floats level) { return level - now[t]; });
      for (int t = 0; t < g; ++t) {
        store(codes + t * N + first, found[t], lanes);
        store(change + t * N + first, e[t], lanes);
      }
    }
  }
}

/* The rows of a thread that share what is read of H. */
constexpr int TILES = 4;

template <int k>
struct Equations {
  static constexpr int WIDTH = k + 1, INPUTS = block_of(k);
  const int group_size, K, groups, n;
  const float *H, *sums;
  std::vector<Ints> codes[TILES];
  std::vector<Floats> planes[TILES];  // of a group: [t][p]

  Equations(int group_size, int K, const float* H, const float* sums)
      : group_size(group_size), K(K), groups((K + group_size - 1) / group_size), n(groups * WIDTH), H(H), sums(sums) {
    for (int tile = 0; tile < TILES; ++tile) {
      codes[tile].resize(K);
      planes[tile].resize(group_size * k);
    }
  }

  /* The rows and columns of a group with itself and all later ones: A [lane][n][n], the lower triangle's blocks. */
  void run(int group, int tiles, float* const* A, const int* lanes) {
    const int start = group * group_size, size = std::min(group_size, K - start);
    for (int tile = 0; tile < tiles; ++tile)
      for (int t = 0; t < size; ++t)
        for (int p = 0; p < k; ++p) planes[tile][t * k + p] = plane(codes[tile][start + t], p);
    for (int other = group; other < groups; ++other) {
      Floats block[TILES][WIDTH][WIDTH] = {};
      const int end = std::min((other + 1) * group_size, K);
      for (int first = other * group_size; first < end; first += INPUTS)
        for (int tile = 0; tile < tiles; ++tile)
          add(group, tile, start, size, first, std::min(INPUTS, end - first), block[tile]);
      for (int tile = 0; tile < tiles; ++tile)
        for (int p = 0; p < WIDTH; ++p)
          for (int q = 0; q < WIDTH; ++q)
            for (int i = 0; i < lanes[tile]; ++i)
              A[tile][((int64_t)i * n + other * WIDTH + p) * n + group * WIDTH + q] = block[tile][p][q][i];
    }
  }

  inline void add(int group, int tile, int start, int size, int first, int count, Floats (*block)[WIDTH]) {
    Floats HX[INPUTS][k] = {};
    const Floats* x = planes[tile].data();
    const float* h = H + (int64_t)start * K + first;
    if (count == INPUTS)
      for (int t = 0; t < size; ++t)
        for (int i = 0; i < INPUTS; ++i)
          for (int p = 0; p < k; ++p) HX[i][p] += h[(int64_t)t * K + i] * x[t * k + p];
    else
      for (int t = 0; t < size; ++t)
        for (int i = 0; i < count; ++i)
          for (int p = 0; p < k; ++p) HX[i][p] += h[(int64_t)t * K + i] * x[t * k + p];
    for (int i = 0; i < count; ++i) {
      const float sum = sums[(int64_t)group * K + first + i];
      for (int p = 0; p < k; ++p) {
        const Floats feature = plane(codes[tile][first + i], p);
        for (int q = 0; q < k; ++q) block[p][q] += feature * HX[i][q];
        block[p][k] += feature * sum;
        block[k][p] += HX[i][p];
      }
      block[k][k] += sum;
    }
  }
};

template <int k>
void normal_equations(int group_size, int K, int64_t N, const uint8_t* codes, const float* H, const float* sums,
                      float* A) {
#pragma omp parallel
  {
    Equations<k> equations(group_size, K, H, sums);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += TILES * LANES) {
      float* rows[TILES];
      int lanes[TILES], tiles = 0;
      for (int64_t row = first; row < std::min<int64_t>(N, first + TILES * LANES); row += LANES, ++tiles) {
        rows[tiles] = A + row * equations.n * equations.n;
        lanes[tiles] = (int)std::min<int64_t>(LANES, N - row);
        for (int t = 0; t < K; ++t) load(equations.codes[tiles][t], codes + t * N + row, lanes[tiles]);
      }
      for (int group = 0; group < equations.groups; ++group) equations.run(group, tiles, rows, lanes);
    }
  }
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

/* grid.descend_group; S: H / diag(H), inverse: 1 / diag(H); all arrays are contiguous. */
void bpdq_descend_group(int g, int64_t N, int k, const float* S, const float* inverse, const float* V, const float* c,
                        const float* W_hat, uint8_t* codes, float* change) {
  const auto run = k == 1 ? descend_group<1> : k == 2 ? descend_group<2> : k == 3 ? descend_group<3> : descend_group<4>;
  run(g, N, S, inverse, V, c, W_hat, codes, change);
}

/* equations.normal_matrix: A [N, n, n] from codes [K, N] and the symmetric H [K, K]; sums [ceil(K/G), K]: of H over
   the inputs of a group. Only blocks of the lower triangle are written. */
void bpdq_normal_matrix(int group_size, int K, int64_t N, int k, const uint8_t* codes, const float* H,
                        const float* sums, float* A) {
  const auto run = k == 1   ? normal_equations<1>
                   : k == 2 ? normal_equations<2>
                   : k == 3 ? normal_equations<3>
                            : normal_equations<4>;
  run(group_size, K, N, codes, H, sums, A);
}
}

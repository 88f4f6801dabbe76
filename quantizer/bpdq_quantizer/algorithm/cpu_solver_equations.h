/* The coefficients of a whole row at once (equations.py). */

#pragma once

#include "cpu_solver_tiles.h"

namespace {

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
  std::vector<Floats> inverse, x, y, best;
  Floats steps[SIZE];

  explicit Cholesky(int groups)
      : blocks(groups), n(groups * SIZE), L((size_t)n * n), inverse(n), x(n), y(n), best(n) {}

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

  /* x: y = L^-1 x, then the solution of L^T c = y, each coefficient rounded when those after it are (rounding.py).
     Returns what rounding adds to the loss. */
  template <class Round>
  Floats back(Round round) {
    Floats loss{};
    for (int m = n - 1; m >= 0; --m) {
      const Floats* l = row(m / SIZE) + m % SIZE;
      const Floats exact = x[m] * inverse[m], value = round(m % SIZE, exact), left = (exact - value) / inverse[m];
      loss += left * left;
      x[m] = value;
      for (int j = 0; j < m; ++j) x[j] -= l[j * SIZE] * value;
    }
    return loss;
  }

  /* rounding.steps_for the coefficients x. */
  void steps_for(const Floats* largest, float margin) {
    constexpr float MOST = 127, FINER = 7;
    for (int lane = 0; lane < LANES; ++lane) {
      float most = 0;
      for (int p = 0; p < SIZE; ++p) most = std::max(most, largest[p][lane]);
      most = std::max(most * margin, 0x1p-90f);
      for (int p = 0; p < SIZE; ++p) {
        const float finer = std::floor(std::log2(most / std::max(largest[p][lane], 0x1p-120f)));
        steps[p][lane] = std::exp2(-std::min(std::max(finer, 0.0f), FINER));
      }
      Floats step = Floats{} + most / MOST;
      step = rounded(step, BFLOAT16);
      for (int p = 0; p < SIZE; ++p) steps[p][lane] *= step[lane];
    }
  }

  /* x: the right sides, then the solutions, in int8 with their steps. */
  void solve(Dtype dtype) {
    for (int m = 0; m < n; ++m) {
      const Floats* l = row(m / SIZE) + m % SIZE;
      for (int j = 0; j < m; ++j) x[m] -= l[j * SIZE] * x[j];
      x[m] *= inverse[m];
    }
    if (dtype != INT8) {
      back([&](int, Floats exact) { return rounded(exact, dtype); });
      return;
    }
    y = x;
    back([](int, Floats exact) { return exact; });
    Floats largest[SIZE] = {}, best_steps[SIZE] = {}, least = Floats{} + std::numeric_limits<float>::infinity();
    for (int m = 0; m < n; ++m) {
      const Floats size = x[m] < 0 ? -x[m] : x[m];
      largest[m % SIZE] = size > largest[m % SIZE] ? size : largest[m % SIZE];
    }
    for (const float margin : {1.0f, 1.12f, 1.25f, 1.4f, 1.6f, 1.8f}) {
      steps_for(largest, margin);
      x = y;
      const Floats loss = back([&](int p, Floats exact) {
        Floats q = round_even(exact / steps[p]);
        q = q > 127.0f ? Floats{} + 127.0f : q;
        return (q < -127.0f ? Floats{} - 127.0f : q) * steps[p];
      });
      const Ints better = loss < least;
      least = better ? loss : least;
      for (int p = 0; p < SIZE; ++p) best_steps[p] = better ? steps[p] : best_steps[p];
      for (int m = 0; m < n; ++m) best[m] = better ? x[m] : best[m];
    }
    std::copy(best_steps, best_steps + SIZE, steps);
    x = best;
  }
};

template <int k>
void solve_jointly(int group_size, int K, int64_t N, const uint8_t* codes, const float* H, const float* b, float alpha,
                   Dtype dtype, float* c, float* steps) {
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
      equations.solve(dtype);
      for (int m = 0; m < n; ++m)
        store(c + m * N + first, failed ? Floats{} + std::numeric_limits<float>::quiet_NaN() : equations.x[m], lanes);
      if (dtype == INT8)
        for (int p = 0; p <= k; ++p) store(steps + p * N + first, equations.steps[p], lanes);
    }
  }
}

}  // namespace

/* The coefficients of a whole row at once (equations.py). */

#pragma once

#include "cpu_solver_products.h"

namespace {

/* Cholesky factorization, in place, and solution of a tile of rows' equations, in blocks [k+1, k+1] that stay in
   registers. */
template <int k>
struct Cholesky {
  static constexpr int SIZE = k + 1, BAND = 8;  // rows of blocks that stay in a near cache
  const int blocks, n;
  Floats* L = nullptr;  // [blocks, n, SIZE]: rows of a block beside each other
  std::vector<Floats> inverse, x, y, best;
  Floats steps[SIZE];

  explicit Cholesky(int groups) : blocks(groups), n(groups * SIZE), inverse(n), x(n), y(n), best(n) {}

  Floats* row(int i) { return L + (size_t)i * n * SIZE; }

  /* Of A [blocks, n, SIZE]; returns the lanes whose matrices are not positive definite. */
  Ints factorize(Floats* A, float alpha) {
    L = A;
    Floats mean{};
    for (int m = 0; m < n; ++m) mean += row(m / SIZE)[m * SIZE + m % SIZE] / (float)n;
    for (int m = 0; m < n; ++m) row(m / SIZE)[m * SIZE + m % SIZE] += alpha * mean;
    Ints failed{};
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
  const size_t tile = (size_t)n * n;
  const std::unique_ptr<Floats[]> A(new Floats[(N + LANES - 1) / LANES * tile]);  // of half of it nothing is known
  const Quadratic quadratic(group_size, K, N, k, codes, H);
#pragma omp parallel
  {
    Products<k> products(quadratic);
#pragma omp for schedule(dynamic)
    for (int last = 0; last < groups; ++last) products.run(groups - 1 - last, n, A.get());
    Cholesky<k> equations(groups);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, N - first);
      const Ints failed = equations.factorize(A.get() + first / LANES * tile, alpha);
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

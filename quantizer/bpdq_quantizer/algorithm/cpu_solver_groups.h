/* A group's codes and coefficients (grid.py): starts, k-means, and rounds of assignment and fit. */

#pragma once

#include "cpu_solver_trellis.h"

namespace {

enum Start { PAPER, RANGE, RESIDUAL };
constexpr int CLUSTER_ROUNDS = 5, INITIAL_BITS = 8;
constexpr float CLUSTER_ALPHA = 1e-6f;

/* Inputs whose sums for n features fit the registers beside their operands. */
constexpr int block_of(int n) { return n == 1 ? 8 : n == 2 ? REGISTERS / 4 : REGISTERS / 8; }

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

/* What a level does to the group's loss. */
struct Assignment {
  static constexpr float most = std::numeric_limits<float>::infinity();
  const float* weight;
  inline Floats error(int, Floats w, Floats level) const { return w - level; }
  inline Floats cost(int t, Floats, Floats e) const { return (e * weight[t]) * (e * weight[t]); }
};

/* Grid: Levels<k> or Trellis<k>. */
template <class Grid>
struct Tile {
  static constexpr int k = Grid::PLANES;
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
        const Swept swept = sweep(Grid(c), W.data(), group.spread, g, codes.data(), e.data(),
                                     Assignment{group.weight});
        fit(c);
        keep_better(c);
        if (!any(swept.moved)) break;
      }
    }
  }
};

template <class Grid>
void quantize_group(const Group& group, const float* W, int64_t N, const Start* starts, int count, uint8_t* codes,
                    float* c, float* E) {
#pragma omp parallel
  {
    Tile<Grid> tile(group);
#pragma omp for schedule(dynamic)
    for (int64_t first = 0; first < N; first += LANES) {
      const int lanes = (int)std::min<int64_t>(LANES, N - first);
      for (int t = 0; t < group.g; ++t) load(tile.W[t], W + t * N + first, lanes);
      tile.run(starts, count);
      for (int t = 0; t < group.g; ++t) {
        store(codes + t * N + first, tile.best_codes[t], lanes);
        store(E + t * N + first, tile.best_E[t], lanes);
      }
      for (int p = 0; p <= Grid::PLANES; ++p) store(c + p * N + first, tile.best_c[p], lanes);
    }
  }
}

}  // namespace

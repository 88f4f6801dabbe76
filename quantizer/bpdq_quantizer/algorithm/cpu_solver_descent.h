/* Descent over the columns of whole rows (refine.py). */

#pragma once

#include "cpu_solver_equations.h"
#include "cpu_solver_trellis.h"

namespace {

struct Change {
  int input;
  float by;
};

/* Descent over whole rows. What changes is listed for each row, and the gradient in a block's inputs is what it was at
   first less the products of H with the row's changes so far. Grid: Levels<k> or Trellis<k>. */
template <class Grid, int WIDE>
struct Descent {
  static constexpr int k = Grid::PLANES, WIDES = WIDE / LANES;
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

  /* What a new level does to the loss; now: W_hat as it is. */
  struct Step {
    static constexpr float most = 0;
    const float* diagonal;
    const Floats* now;
    inline Floats error(int t, Floats, Floats level) const { return level - now[t]; }
    inline Floats cost(int t, Floats w, Floats e) const { return diagonal[t] * e * (e - 2 * (w - now[t])); }
  };

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
    Floats levels[k + 1];
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
    const Swept swept = sweep(Grid(levels), at.base.data(), S.data(), g, at.found.data(), at.e.data(),
                                 Step{diagonal.data() + start, at.now.data()});
    for (int lane = 0; lane < lanes; ++lane) gain[first + lane] -= swept.cost[lane];
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

template <class Grid>
void descend(int group_size, int K, int64_t N, int sweeps, const float* V, const float* H, const float* c,
             uint8_t* codes, float* gain) {
  if (group_size <= 32) Descent<Grid, 32>(K, group_size, N, H, V, c, codes, gain).run(sweeps);
  else Descent<Grid, 64>(K, group_size, N, H, V, c, codes, gain).run(sweeps);
}

}  // namespace

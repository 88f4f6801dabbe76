/* Codes of a trellis' chains (chains.py): of all paths that end in one of the four states, the best is gone on with. */

#pragma once

#include "cpu_solver_tiles.h"

namespace {

constexpr int CHAIN = 32, STATES = 4;  // a state: the chain's last coded bit, and 2 times the one before

/* The 2^k levels of a group's rows by their codes: bits z0, z1, then the others, which are free. */
template <int k>
struct Trellis {
  static constexpr int PLANES = k, FREE = 1 << (k - 2);
  Floats level[4 * FREE];

  explicit Trellis(const Floats* c) {
    for (int j = 0; j < 4 * FREE; ++j) {
      level[j] = c[k];
      for (int p = 0; p < k; ++p)
        if (j >> p & 1) level[j] += c[p];
    }
  }

  /* The level nearest to w among those with these two bits, and its code. */
  inline Floats nearest(Floats w, int coded, Ints& found) const {
    Floats best = level[coded], distance = magnitude(w - best);
    found = Ints{} + coded;
    for (int j = coded + 4; j < 4 * FREE; j += 4) {
      const Floats other = magnitude(w - level[j]);
      const Ints nearer = other < distance;
      best = nearer ? level[j] : best;
      found = nearer ? Ints{} + j : found;
      distance = nearer ? other : distance;
    }
    return best;
  }
};

/* What led to each state at an input: the better of two earlier ones, which differ in their second bit. */
struct Steps {
  Ints from[STATES], code[STATES];
  Floats e[STATES];
};

template <class T>
inline T of_state(const T* values, Ints state) {
  const Ints odd = (state & 1) != 0, upper = (state & 2) != 0;
  return upper ? (odd ? values[3] : values[2]) : (odd ? values[1] : values[0]);
}

/* As the other `sweep`, where codes must be a path of the trellis in each chain: that with the least sum of
   step.cost(t, w, e). A chain whose best path costs more than step.most keeps its codes, and e = 0. */
template <int k, class Step>
Swept sweep(const Trellis<k>& levels, const Floats* base, const float* S, int g, Ints* codes, Floats* e,
            Step step) {
  Swept swept{};
  for (int first = 0; first < g; first += CHAIN) {
    const int count = std::min(CHAIN, g - first);
    Floats w[CHAIN][STATES], cost[STATES];
    Steps steps[CHAIN];
    for (int i = 0; i < count; ++i) w[i][0] = base[first + i];
    for (int j = 0; j < first; ++j)
      for (int i = 0; i < count; ++i) w[i][0] -= S[(int64_t)j * g + first + i] * e[j];
    for (int i = 0; i < count; ++i)
      for (int s = 1; s < STATES; ++s) w[i][s] = w[i][0];
    for (int s = 0; s < STATES; ++s) cost[s] = Floats{} + (s ? std::numeric_limits<float>::infinity() : 0.0f);

    for (int i = 0; i < count; ++i) {
      const int t = first + i;
      Floats reached[STATES];
      for (int last = 0; last < 2; ++last) {
        Floats total[2][2], error[2][2];  // by the second bit and z1
        Ints code[2][2];
        for (int second = 0; second < 2; ++second)
          for (int z1 = 0; z1 < 2; ++z1) {
            const int s = last | second << 1;
            const Floats level = levels.nearest(w[i][s], last | z1 << 1, code[second][z1]);
            error[second][z1] = step.error(t, w[i][s], level);
            total[second][z1] = cost[s] + step.cost(t, w[i][s], error[second][z1]);
          }
        for (int x = 0; x < 2; ++x) {
          const int s = x | last << 1;
          const Ints from = total[1][x ^ 1] < total[0][x];
          reached[s] = from ? total[1][x ^ 1] : total[0][x];
          steps[i].from[s] = from;
          steps[i].code[s] = from ? code[1][x ^ 1] : code[0][x];
          steps[i].e[s] = from ? error[1][x ^ 1] : error[0][x];
        }
      }
      std::copy(reached, reached + STATES, cost);
      for (int later = i + 1; later < count; ++later) {
        const float spread = S[(int64_t)t * g + first + later];
        Floats moved[STATES];
        for (int s = 0; s < STATES; ++s)
          moved[s] = (steps[i].from[s] ? w[later][s >> 1 | 2] : w[later][s >> 1]) - spread * steps[i].e[s];
        std::copy(moved, moved + STATES, w[later]);
      }
    }

    Ints state{};
    Floats least = cost[0];
    for (int s = 1; s < STATES; ++s) {
      const Ints better = cost[s] < least;
      least = better ? cost[s] : least;
      state = better ? Ints{} + s : state;
    }
    const Ints taken = least <= step.most;
    swept.cost += taken ? least : Floats{};
    for (int i = count - 1; i >= 0; --i) {
      const int t = first + i;
      const Ints code = taken ? of_state(steps[i].code, state) : codes[t];
      swept.moved |= code != codes[t];
      codes[t] = code;
      e[t] = taken ? of_state(steps[i].e, state) : Floats{};
      state = state >> 1 | (of_state(steps[i].from, state) & 2);
    }
  }
  return swept;
}

}  // namespace

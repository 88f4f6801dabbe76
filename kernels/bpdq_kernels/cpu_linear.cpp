/* y = x @ W.T + bias on a CPU, straight from bit-planes. The kernels walk the same layout: the tiles that `to_cpu_tiles`
   in layout.py makes, draws, and gives the sizes of (BPDQ_WORD, BPDQ_TILE and BPDQ_MAX_GROUP are set by cpu.py). Bit j
   of a lane is the plane bit of the word's input j: all kernels take the low bits first.

   Lookup, for few tokens: four inputs of a token have 16 possible partial sums, which fill one register. The low
   four bits of every lane pick 16 outputs' sums in one permutation:

     sums += c_p * permute(table[inputs 4j .. 4j+3], word);  word >>= 4         3 instructions for 64 plane bits

   and once per group y += c0 * sum(x) + sum_p sums_p. The product costs nothing: where permutations, shifts and
   additions would share pipes, multiply-adds have their own. AVX2 does the same with eight sums of three inputs, and
   for inputs of 16 bits, any number of tokens, with bytes of 16 sums (cpu_linear_bytes.h).

   Multiply, for many tokens: the 2^k possible weights of a group and tile are computed once; bit tests and blends
   choose among them, once for up to 64 tokens. With AVX512_BF16 the weights are rounded to bf16, as a 16-bit layer
   would hold them, and the two halves of a word are the pairs of inputs that vdpbf16ps multiplies.

   The experts of a layer are many such W: rows of y are sorted by expert, and each expert has the kernel that suits its
   rows. A thread owns a range of the experts' tiles, so no result depends on the number of threads. Inputs past K read
   as 0.
   Compiled once for each instruction set (compiled.py has the flags); OpenMP's threads are those of torch. */

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <omp.h>
#include <type_traits>
#include <vector>

#include "cpu_linear_bytes.h"
#include "cpu_linear_lookup.h"
#include "cpu_linear_multiply.h"

namespace {

/* x [rows, K], with rows `stride` elements apart. */
struct Inputs {
  const void* x;
  Dtype dtype;  // fp32, or 16 bits
  int64_t stride;

  /* `count` inputs of a row from `first` on. */
  void read(int64_t row, int64_t first, int64_t count, uint16_t* out) const {
    memcpy(out, (const uint16_t*)x + row * stride + first, count * sizeof *out);
  }
  void read(int64_t row, int64_t first, int64_t count, float* out) const {
    if (dtype == FLOAT32) {
      memcpy(out, (const float*)x + row * stride + first, count * sizeof *out);
      return;
    }
    uint16_t halves[MAX_GROUP] = {};
    read(row, first, count, halves);
    for (int64_t i = 0; i < count; i += LANES) {
      const Floats values = widen(halves, i, dtype);
      memcpy(out + i, &values, sizeof values);
    }
  }
};

/* Rows of y [.., N] fp32 and what makes them: row i is that of inputs i / choices. */
struct Rows {
  const int64_t* of;
  int64_t count, choices;
  Inputs inputs;
  float* y;
};

template <class Kernel>
struct Scratch {
  Kernel kernel;
  alignas(64) float sums[BLOCK][Kernel::TOKENS][TILE];
};

/* Tiles [first, last) of `rows`. */
template <int PLANES, class Kernel>
void run_tiles(Scratch<Kernel>& scratch, const Layer& layer, const Rows& rows, const float* bias, int64_t first,
               int64_t last) {
  const int64_t group_words = layer.group_size / WORD;
  for (int64_t row = 0; row < rows.count; row += Kernel::TOKENS)
    for (int64_t block = first; block < last; block += BLOCK) {
      const int64_t end = std::min(block + BLOCK, last);
      const int count = std::min<int64_t>(Kernel::TOKENS, rows.count - row);
      for (auto& sums : scratch.sums) memset(sums, 0, count * sizeof *sums);
      for (int64_t word = 0, group = 0; word < layer.words(); word += group_words, group++) {
        const int words = std::min(group_words, layer.words() - word);
        for (int i = 0; i < count; i++) {
          alignas(64) typename Kernel::Input values[MAX_GROUP] = {};
          const int64_t inputs = std::min<int64_t>(words * WORD, layer.in_features - word * WORD);
          rows.inputs.read(rows.of[row + i] / rows.choices, word * WORD, inputs, values);
          scratch.kernel.take(i, values, words);
        }
        for (int64_t tile = block; tile < end; tile++) {
          TileGroup<PLANES> held(layer, group, tile, block, end);
#ifdef BPDQ_BYTES
          alignas(64) uint32_t gathered[MAX_GROUP / WORD * PLANES * TILE];
          if (!std::is_same_v<Kernel, LookupBytes<PLANES>>) held.gather(gathered);
#endif
          scratch.kernel.tile(held, count, scratch.sums[tile - block][0]);
        }
      }
      for (int64_t tile = block; tile < end; tile++)
        for (int i = 0; i < count; i++) {
          float* out = rows.y + rows.of[row + i] * layer.out_features + tile * TILE;
          const int lanes = std::min<int64_t>(TILE, layer.out_features - tile * TILE);
          for (int lane = 0; lane < lanes; lane++)
            out[lane] = scratch.sums[tile - block][i][lane] + (bias ? bias[tile * TILE + lane] : 0);
        }
    }
}

/* A thread's kernels; those that it needs have memory. */
template <int PLANES>
struct Kernels {
  template <class Kernel>
  using Held = std::unique_ptr<Scratch<Kernel>>;
  Held<Lookup<PLANES>> lookup;
  Held<Multiply<PLANES, OneFloat>> multiply;
#ifdef __AVX512BF16__
  Held<Multiply<PLANES, TwoBfloats>> multiply_pairs;
#endif
#ifdef BPDQ_BYTES
  Held<LookupBytes<PLANES>> lookup_bytes;
#endif

  template <class Kernel, class... Rest>
  static void run(Held<Kernel>& held, const Rest&... rest) {
    if (!held) held.reset(new Scratch<Kernel>);
    run_tiles<PLANES>(*held, rest...);
  }

  void run(const Layer& layer, const Rows& rows, int64_t few, const float* bias, int64_t first, int64_t last) {
#ifdef BPDQ_BYTES
    if (rows.count <= few && rows.inputs.dtype != FLOAT32) return run(lookup_bytes, layer, rows, bias, first, last);
#endif
    if (rows.count <= few) return run(lookup, layer, rows, bias, first, last);
#ifdef __AVX512BF16__
    if (rows.inputs.dtype == BFLOAT16) return run(multiply_pairs, layer, rows, bias, first, last);
#endif
    run(multiply, layer, rows, bias, first, last);
  }
};

/* Row numbers by expert: those of expert e are rows[begin[e]] .. rows[begin[e + 1]]. */
struct Sorted {
  std::vector<int64_t> rows, begin;

  /* ids: of each row the expert, which may be none of ours, or null where all rows are of one expert. */
  Sorted(const int64_t* ids, int64_t count, int64_t experts) : rows(count), begin(experts + 1) {
    if (!ids) {
      std::iota(rows.begin(), rows.end(), 0);
      begin[experts] = count;
      return;
    }
    const auto ours = [&](int64_t row) { return ids[row] >= 0 && ids[row] < experts; };
    for (int64_t row = 0; row < count; row++)
      if (ours(row)) begin[ids[row] + 1]++;
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<int64_t> next(begin);
    for (int64_t row = 0; row < count; row++)
      if (ours(row)) rows[next[ids[row]]++] = row;
  }

  int64_t experts() const { return begin.size() - 1; }
  int64_t count(int64_t expert) const { return begin[expert + 1] - begin[expert]; }
};

/* layer: the first expert; bias: [E, N] or null. Threads get about equal shares of the work, in units of what one more
   row costs a tile that is multiplied: its weights cost three, and a row looked up two. */
template <int PLANES>
void run(const Layer& layer, const Inputs& inputs, const Sorted& sorted, int64_t choices, int64_t few,
         const float* bias, float* y) {
  const int64_t tiles = layer.tiles();
  const auto work = [&](int64_t expert) {
    const int64_t rows = sorted.count(expert);
    return rows <= few ? 2 * rows : rows + 3;
  };
  int64_t all = 0;
  for (int64_t expert = 0; expert < sorted.experts(); expert++) all += work(expert) * tiles;
#pragma omp parallel
  {
    Kernels<PLANES> kernels;
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t before = 0;
    for (int64_t expert = 0; expert < sorted.experts(); expert++) {
      const int64_t each = work(expert);
      if (!each) continue;
      const auto tile = [&](int64_t thread) {
        const int64_t share = all * thread / threads - before;
        return std::clamp<int64_t>((share + each - 1) / each, 0, tiles);
      };
      const int64_t first = tile(thread), last = tile(thread + 1);
      const Rows rows{sorted.rows.data() + sorted.begin[expert], sorted.count(expert), choices, inputs, y};
      const float* added = bias ? bias + expert * layer.out_features : nullptr;
      if (first < last) kernels.run(layer.expert(expert, PLANES), rows, few, added, first, last);
      before += each * tiles;
    }
  }
}

}  // namespace

/* y fp32 [rows, N]: row i = x[i / choices] @ W[ids[i]].T + bias[ids[i]], or as it was where ids[i] is not in [0, E).
   x is of `x_dtype`, fp32 or 16 bits; ids null where E = 1 and all rows are of that expert; bias fp32 [E, N] or null,
   and so are the scales but of INT8. Planes, coefficients and scales of the experts follow each other. */
extern "C" void bpdq_linear(const uint32_t* planes, const char* coefficients, int dtype, const float* scales,
                            int64_t in_features, int64_t out_features, int64_t group_size, int64_t plane_count,
                            int64_t experts, const void* x, int x_dtype, int64_t stride, const int64_t* ids,
                            int64_t rows, int64_t choices, const float* bias, float* y, int64_t few) {
  const Layer layer{planes, coefficients, (Dtype)dtype, scales, in_features, out_features, group_size};
  const Inputs inputs{x, (Dtype)x_dtype, stride};
  const Sorted sorted(ids, rows, experts);
  if (plane_count == 1) run<1>(layer, inputs, sorted, choices, few, bias, y);
  if (plane_count == 2) run<2>(layer, inputs, sorted, choices, few, bias, y);
  if (plane_count == 3) run<3>(layer, inputs, sorted, choices, few, bias, y);
  if (plane_count == 4) run<4>(layer, inputs, sorted, choices, few, bias, y);
}

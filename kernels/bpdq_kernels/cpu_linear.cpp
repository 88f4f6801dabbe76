/* y = x @ W.T + bias on a CPU, straight from bit-planes. The kernels walk the same layout: tiles that `to_cpu_tiles` in
   layout.py makes, draws, and gives the sizes of (BPDQ_WORD, BPDQ_TILE and BPDQ_MAX_GROUP are set by cpu.py). Bit j
   of a lane is the plane bit of the word's input j: all kernels take the low bits first.

   Lookup, for few tokens: four inputs of a token have 16 possible partial sums, which fill one register. The low
   four bits of every lane pick 16 outputs' sums in one permutation:

     sums += c_p * permute(table[inputs 4j .. 4j+3], word);  word >>= 4         3 instructions for 64 plane bits

   and once per group y += c0 * sum(x) + sum_p sums_p. The product costs nothing: where permutations, shifts and
   additions would share pipes, multiply-adds have their own. AVX2 does the same with eight sums of three inputs, and
   for inputs of 16 bits, any number of tokens, with bytes of 16 sums (cpu_linear_bytes.h). With AVX-512 VBMI and VNNI
   whole numbers in pairs of bytes take half the instructions (cpu_linear_pairs.h).

   Multiply, for many tokens: the 2^k possible weights of a group and tile are computed once; bit tests and blends
   choose among them, once for up to 128 tokens. With AVX512_BF16 the weights are rounded to bf16, as a 16-bit layer
   would hold them, and the two halves of a word are the pairs of inputs that vdpbf16ps multiplies, or AMX 16 of them at
   once (cpu_linear_amx.h).

   Trellis-coded planes lie with the bits of a word in the order of its chain, as inputs then do: in that order the two
   planes that the first one stands for are shifts of it.

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
#include <vector>

#include "cpu_linear_activation.h"
#include "cpu_linear_amx.h"
#include "cpu_linear_bytes.h"
#include "cpu_linear_lookup.h"
#include "cpu_linear_multiply.h"
#include "cpu_linear_pairs.h"
#include "cpu_linear_rows.h"

namespace {

constexpr int64_t TOKENS_AT_ONCE = 2048;  // of experts, whose rows between the two matrices are fp32

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

/* y [rows, N], without gaps. */
struct Outputs {
  void* y;
  Dtype dtype;  // fp32, or 16 bits

  void write(int64_t at, float value) const {
    if (dtype == FLOAT32)
      ((float*)y)[at] = value;
    else
      ((uint16_t*)y)[at] = dtype == BFLOAT16 ? narrow_to_bfloat(value) : narrow_to_half(value);
  }

  /* The sums of a tile's outputs, of which there are `count`, in its row of y from `at` on. */
  void write(int64_t at, int count, const float* sums, const float* bias) const {
    int lane = 0;
    for (; lane + LANES <= count; lane += LANES) {
      Floats values = load<Floats>(sums + lane);
      if (bias) values += load<Floats>(bias + lane);
      if (dtype == FLOAT32) {
        memcpy((float*)y + at + lane, &values, sizeof values);
      } else {
        const Halves halves = narrow(values, dtype);
        memcpy((uint16_t*)y + at + lane, &halves, sizeof halves);
      }
    }
    for (; lane < count; lane++) write(at + lane, sums[lane] + (bias ? bias[lane] : 0));
  }
};

/* Rows of y [.., N] and what makes them: row i is that of inputs i / choices. */
struct Rows {
  const int64_t* of;
  int64_t count, choices;
  Inputs inputs;
  Outputs outputs;
};

template <class Kernel>
struct Scratch {
  Kernel kernel;
  alignas(64) float sums[BLOCK * Kernel::TOKENS][TILE];  // of a tile those of all tokens beside each other
};

/* Row `to` of y, without gaps: row `from` of x [.., K] times a weight. */
inline void scale(const Inputs& x, int64_t from, float weight, int64_t in_features, const Outputs& y, int64_t to) {
  float values[MAX_GROUP];
  for (int64_t first = 0; first < in_features; first += MAX_GROUP) {
    const int64_t count = std::min<int64_t>(MAX_GROUP, in_features - first);
    x.read(from, first, count, values);
    for (int64_t i = 0; i < count; i++) y.write(to * in_features + first + i, values[i] * weight);
  }
}

/* Puts the inputs of each word in the order of their chain, even ones before odd ones. */
template <class Input>
void to_chains(Input* values, int words) {
  for (Input* word = values; word < values + words * WORD; word += WORD) {
    Input odd[WORD / 2];
    for (int i = 0; i < WORD / 2; i++) {
      odd[i] = word[2 * i + 1];
      word[i] = word[2 * i];
    }
    memcpy(word + WORD / 2, odd, sizeof odd);
  }
}

/* Tiles [first, last) of `rows`. */
template <int PLANES, class Kernel>
void run_tiles(Scratch<Kernel>& scratch, const Layer& layer, const Rows& rows, const float* bias, int64_t first,
               int64_t last) {
  const int64_t group_words = layer.group_size / WORD;
  const int64_t taken = std::max<int64_t>(group_words, Kernel::WORDS_AT_ONCE);
  for (int64_t row = 0; row < rows.count; row += Kernel::TOKENS) {
    const int count = std::min<int64_t>(Kernel::TOKENS, rows.count - row);
    const int room = (count + Kernel::AT_ONCE - 1) / Kernel::AT_ONCE * Kernel::AT_ONCE;
    const int64_t together = BLOCK * std::min(FEW, Kernel::TOKENS / room);
    for (int64_t block = first; block < last; block += together) {
      const int64_t end = std::min(block + together, last);
      memset(scratch.sums, 0, (end - block) * room * sizeof *scratch.sums);
      for (int64_t word = 0; word < layer.words(); word += taken) {
        const int words = std::min(taken, layer.words() - word);
        for (int i = 0; i < count; i++) {
          alignas(64) typename Kernel::Input values[MAX_GROUP] = {};
          const int64_t inputs = std::min<int64_t>(words * WORD, layer.in_features - word * WORD);
          rows.inputs.read(rows.of[row + i] / rows.choices, word * WORD, inputs, values);
          if (layer.trellis) to_chains(values, words);
          scratch.kernel.take(i, values, words);
        }
        const auto multiply = [&](const Group<PLANES>& group, int64_t tile, auto... place) {
          TileGroup<PLANES> held(group, tile);
          typename TileGroup<PLANES>::Derived derived;
          held.template as<Kernel::FORM>(layer, derived);
          scratch.kernel.tile(held, count, scratch.sums[(tile - block) * room], place...);
        };
        if constexpr (Kernel::WORDS_AT_ONCE == 1) {
          const Group<PLANES> group(layer, word / group_words, block, end);
          for (int64_t tile = block; tile < end; tile++) multiply(group, tile);
        } else {
          for (int64_t tile = block; tile < end; tile++)
            for (int at = 0; at < words; at += group_words) {
              const Group<PLANES> group(layer, (word + at) / group_words, block, end);
              multiply(group, tile, at, at + group_words >= words);
            }
        }
      }
      for (int64_t tile = block; tile < end; tile++)
        for (int i = 0; i < count; i++) {
          const float* sums = scratch.sums[(tile - block) * room + i];
          const int64_t out = rows.of[row + i] * layer.out_features + tile * TILE;
          const int lanes = std::min<int64_t>(TILE, layer.out_features - tile * TILE);
          rows.outputs.write(out, lanes, sums, bias ? bias + tile * TILE : nullptr);
        }
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
#ifdef BPDQ_AMX
  Held<MultiplyTiles<PLANES>> multiply_pairs;
#elif defined(__AVX512BF16__)
  Held<Multiply<PLANES, TwoBfloats>> multiply_pairs;
#endif
#ifdef BPDQ_BYTES
  Held<LookupBytes<PLANES>> lookup_bytes;
#endif
#ifdef BPDQ_PAIRS
  Held<LookupPairs<PLANES, false, 1>> pairs;
  Held<LookupPairs<PLANES, false, 2>> pairs_of_floats;
  Held<LookupPairs<PLANES, true, 1>> trellis_pairs;
  Held<LookupPairs<PLANES, true, 2>> trellis_pairs_of_floats;
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
#ifdef BPDQ_PAIRS
    if (rows.count <= few) {
      const bool floats = rows.inputs.dtype == FLOAT32;
      if constexpr (PLANES > 1) {
        if (layer.trellis && floats) return run(trellis_pairs_of_floats, layer, rows, bias, first, last);
        if (layer.trellis) return run(trellis_pairs, layer, rows, bias, first, last);
      }
      if (floats) return run(pairs_of_floats, layer, rows, bias, first, last);
      return run(pairs, layer, rows, bias, first, last);
    }
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

/* The matrix of the first expert. */
Layer first_of(const Matrix& matrix) {
  return {matrix.planes,      matrix.coefficients, (Dtype)matrix.dtype, matrix.scales,
          matrix.in_features, matrix.out_features, matrix.group_size,   matrix.trellis};
}

/* Up to how many tokens look-ups beat multiplications, of inputs in `dtype` with `planes` that are multiplied: sums that
   are looked up are made once for all `outputs`. */
int64_t few_tokens(Dtype dtype, int64_t planes, int64_t group_size, int64_t outputs) {
#ifdef BPDQ_AMX
  if (dtype == BFLOAT16) return 16;
#endif
#if defined(BPDQ_PAIRS)
  const bool is_wide = group_size >= 64 && outputs >= (group_size > 64 ? 768 : 1536);
  return dtype == FLOAT16 || planes == 1 || (planes == 2 && is_wide) ? INT64_MAX : 16;
#elif defined(BPDQ_BYTES)
  return dtype == FLOAT32 ? 4 : INT64_MAX;
#elif defined(__AVX512BF16__)
  return dtype == BFLOAT16 ? 4 : 8;
#else
  return 8;
#endif
}

/* One of a team of threads. */
struct Thread {
  int64_t number = omp_get_thread_num(), team = omp_get_num_threads();
};

/* What one thread computes. Threads get about equal shares of the work, in units of what one more row costs a tile that
   is multiplied: its weights cost three, and a row looked up two. */
template <int PLANES>
void share(const Thread& thread, const Matrix& matrix, const Inputs& inputs, const Outputs& outputs,
           const Sorted& sorted, int64_t choices, int64_t few) {
  const Layer layer = first_of(matrix);
  const int64_t tiles = layer.tiles();
  const auto work = [&](int64_t expert) {
    const int64_t rows = sorted.count(expert);
    return rows <= few ? 2 * rows : rows + 3;
  };
  int64_t all = 0, before = 0;
  for (int64_t expert = 0; expert < sorted.experts(); expert++) all += work(expert) * tiles;
  Kernels<PLANES> kernels;
  for (int64_t expert = 0; expert < sorted.experts(); expert++) {
    const int64_t each = work(expert);
    if (!each) continue;
    const auto tile = [&](int64_t number) {
      const int64_t share = all * number / thread.team - before;
      return std::clamp<int64_t>((share + each - 1) / each, 0, tiles);
    };
    const int64_t first = tile(thread.number), last = tile(thread.number + 1);
    const Rows rows{sorted.rows.data() + sorted.begin[expert], sorted.count(expert), choices, inputs, outputs};
    const float* bias = matrix.bias ? matrix.bias + expert * layer.out_features : nullptr;
    if (first < last) kernels.run(layer.expert(expert, PLANES), rows, few, bias, first, last);
    before += each * tiles;
  }
}

template <class... Rest>
void share(const Thread& thread, const Matrix& matrix, const Rest&... rest) {
  const int64_t multiplied = matrix.multiplied();
  if (multiplied == 1) share<1>(thread, matrix, rest...);
  if (multiplied == 2) share<2>(thread, matrix, rest...);
  if (multiplied == 3) share<3>(thread, matrix, rest...);
  if (multiplied == 4) share<4>(thread, matrix, rest...);
}

}  // namespace

extern "C" void bpdq_linear(const Matrix* matrix, const void* x, int64_t dtype, int64_t stride, int64_t rows,
                            int64_t few, void* y) {
  if (few < 0) few = few_tokens((Dtype)dtype, matrix->multiplied(), matrix->group_size, matrix->out_features);
  const Sorted sorted(nullptr, rows, 1);
  const Inputs inputs{x, (Dtype)dtype, stride};
#pragma omp parallel
  share(Thread(), *matrix, inputs, Outputs{y, (Dtype)dtype}, sorted, 1, few);
}

extern "C" void bpdq_rows(const Matrix* matrix, const int64_t* ids, int64_t rows, int64_t dtype, void* y) {
  const Layer layer = first_of(*matrix);
  const Outputs outputs{y, (Dtype)dtype};
#pragma omp parallel for if (rows > 1)
  for (int64_t row = 0; row < rows; row++)
    weights_of(layer, matrix->multiplied(), ids[row], [&](int64_t input, float weight) {
      outputs.write(row * layer.in_features + input, weight);
    });
}

namespace {

/* `bpdq_experts` of a few tokens. */
void run_experts(const Matrix* up, const Matrix* down, int64_t experts, const Inputs& x, const int64_t* ids,
                 const float* weights, int64_t tokens, int64_t choices, const Activation& activation,
                 bool weights_on_input, int64_t few, const Outputs& outputs) {
  const int64_t rows = tokens * choices, inner = down->in_features, outer = down->out_features;
  const Sorted sorted(ids, rows, experts);
  const std::unique_ptr<float[]> middle(new float[rows * up->out_features]), outs(new float[rows * outer]);
  const std::unique_ptr<float[]> room(new float[rows * inner]);
  const std::unique_ptr<float[]> scaled(new float[weights_on_input ? rows * up->in_features : 0]);
  const Outputs activated{room.get(), x.dtype}, weighed{scaled.get(), x.dtype};
  const Inputs ours = weights_on_input ? Inputs{scaled.get(), x.dtype, up->in_features} : x;
#pragma omp parallel
  {
    const Thread thread;
    const auto part = [&](int64_t count, int64_t number) { return count * number / thread.team; };
    if (weights_on_input) {
      for (int64_t row = part(rows, thread.number); row < part(rows, thread.number + 1); row++)
        scale(x, row / choices, weights[row], up->in_features, weighed, row);
#pragma omp barrier
    }
    share(thread, *up, ours, Outputs{middle.get(), FLOAT32}, sorted, weights_on_input ? 1 : choices, few);
#pragma omp barrier
    const int64_t first = sorted.begin[0], ours = sorted.begin[experts] - first;
    for (int64_t i = part(ours * inner, thread.number); i < part(ours * inner, thread.number + 1); i++) {
      const int64_t row = sorted.rows[first + i / inner], at = i % inner;
      const float* values = middle.get() + row * up->out_features + at;
      activated.write(row * inner + at, activation.of(values, inner));
    }
#pragma omp barrier
    share(thread, *down, Inputs{room.get(), x.dtype, inner}, Outputs{outs.get(), FLOAT32}, sorted, 1, few);
#pragma omp barrier
    for (int64_t i = part(tokens * outer, thread.number); i < part(tokens * outer, thread.number + 1); i++) {
      float sum = 0;
      for (int64_t row = i / outer * choices; row < (i / outer + 1) * choices; row++)
        if (ids[row] >= 0 && ids[row] < experts)
          sum += (weights_on_input ? 1 : weights[row]) * outs[row * outer + i % outer];
      outputs.write(i, sum);
    }
  }
}

}  // namespace

extern "C" void bpdq_experts(const Matrix* up, const Matrix* down, int64_t experts, const void* x, int64_t dtype,
                             int64_t stride, const int64_t* ids, const float* weights, int64_t tokens, int64_t choices,
                             int64_t activation, float alpha, float limit, bool weights_on_input, int64_t few,
                             void* y) {
  if (few < 0)
    few = few_tokens((Dtype)dtype, std::max(up->multiplied(), down->multiplied()),
                     std::min(up->group_size, down->group_size), std::min(up->out_features, down->out_features));
  const int64_t itemsize = dtype == FLOAT32 ? 4 : 2;
  for (int64_t first = 0; first < tokens; first += TOKENS_AT_ONCE) {
    const int64_t at = first * choices;
    const Inputs inputs{(const char*)x + first * stride * itemsize, (Dtype)dtype, stride};
    const Outputs outputs{(char*)y + first * down->out_features * itemsize, (Dtype)dtype};
    run_experts(up, down, experts, inputs, ids + at, weights + at, std::min(TOKENS_AT_ONCE, tokens - first), choices,
                {(Activation::Name)activation, alpha, limit}, weights_on_input, few, outputs);
  }
}

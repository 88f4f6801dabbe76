/* y = x @ W.T + bias on a CPU, straight from bit-planes. Two kernels walk the same layout: the tiles that `to_cpu_tiles`
   in layout.py makes, draws, and gives the sizes of (BPDQ_WORD, BPDQ_TILE and BPDQ_MAX_GROUP are set by cpu.py). Bit j
   of a lane is the plane bit of the word's input j: both kernels take the low bits first.

   Lookup, for few tokens: four inputs of a token have 16 possible partial sums, which fill one register. The low
   four bits of every lane pick 16 outputs' sums in one permutation:

     sums += c_p * permute(table[inputs 4j .. 4j+3], word);  word >>= 4         3 instructions for 64 plane bits

   and once per group y += c0 * sum(x) + sum_p sums_p. The product costs nothing: where permutations, shifts and
   additions would share pipes, multiply-adds have their own. AVX2 does the same with eight sums of three inputs.

   Multiply, for many tokens: the 2^k possible weights of a group and tile are computed once; bit tests and blends
   choose among them, once for up to 64 tokens. With AVX512_BF16 the weights are rounded to bf16, as a 16-bit layer
   would hold them, and the two halves of a word are the pairs of inputs that vdpbf16ps multiplies.

   A thread owns a range of tiles, so no result depends on the number of threads. Inputs past K read as 0.
   Compiled once for each instruction set (compiled.py has the flags); OpenMP's threads are those of torch. */

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <omp.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TABLE_BITS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, TABLE_BITS = 3;
#else
constexpr int LANES = 4, TABLE_BITS = 1;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

constexpr int WORD = BPDQ_WORD, TILE = BPDQ_TILE, MAX_GROUP = BPDQ_MAX_GROUP;
static_assert(WORD == 8 * sizeof(uint32_t), "a lane holds one word");
static_assert(TILE % (2 * LANES) == 0, "tiles are pairs of registers");
constexpr int BLOCK = 64;  // tiles between which a thread's tables and inputs stay in cache
constexpr int TABLES = (WORD + TABLE_BITS - 1) / TABLE_BITS;  // per word

constexpr int AHEAD = 512;  // words of planes between those in use and those fetched from memory

enum Dtype { FLOAT32, FLOAT16, BFLOAT16, INT8 };

template <class T>
inline T load(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

/* LANES numbers of `dtype` from element `i` of `p`, as fp32. */
inline Floats widen(const void* p, int64_t i, Dtype dtype) {
  if (dtype == FLOAT32) return load<Floats>((const float*)p + i);
  const uint16_t* half = (const uint16_t*)p + i;
#if defined(__AVX512F__)
  if (dtype == BFLOAT16) return (Floats)((Words)_mm512_cvtepu16_epi32(load<__m256i>(half)) << 16);
  return (Floats)_mm512_cvtph_ps(load<__m256i>(half));
#elif defined(__AVX2__)
  if (dtype == BFLOAT16) return (Floats)((Words)_mm256_cvtepu16_epi32(load<__m128i>(half)) << 16);
  return (Floats)_mm256_cvtph_ps(load<__m128i>(half));
#else
  if (dtype == BFLOAT16) return (Floats)(__builtin_convertvector(load<Halves>(half), Words) << 16);
  Words bits = __builtin_convertvector(load<Halves>(half), Words);
  return (Floats)((bits & 0x8000) << 16 | (bits & 0x7fff) << 13) * 0x1p112f;  // the exponents' bias differs by 112
#endif
}

/* LANES numbers from `p` on, as fp32. */
inline Floats widen_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(p)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  return __builtin_convertvector(load<Bytes>(p), Floats);
#endif
}

struct Layer {
  const uint32_t* planes;
  const char* coefficients;
  Dtype dtype;          // of the coefficients
  const float* scales;  // of INT8
  int64_t in_features, out_features, group_size;

  int64_t tiles() const { return (out_features + TILE - 1) / TILE; }
  int64_t words() const { return (in_features + WORD - 1) / WORD; }
};

/* Of LANES outputs in one group: those of the planes, then c0. */
template <int PLANES>
struct Coefficients {
  Floats of[PLANES + 1];
};

/* What `layer` holds of one tile in one group; `ahead`: the planes to fetch from memory meanwhile, where groups follow
   each other and in each of them the tiles from `begin` to `end`. */
template <int PLANES>
struct TileGroup {
  int words;
  const uint32_t *planes, *ahead;
  Coefficients<PLANES> c[TILE / LANES];

  TileGroup(const Layer& layer, int64_t group, int64_t tile, int64_t begin, int64_t end) {
    const int64_t whole = layer.group_size / WORD;
    const auto start = [&](int64_t group, int64_t tile) {
      const int64_t first = group * whole, words = std::min(whole, layer.words() - first);
      return layer.planes + (first * layer.tiles() + tile * words) * PLANES * TILE;
    };
    words = std::min(whole, layer.words() - group * whole);
    planes = start(group, tile);
    const int64_t later = tile + AHEAD / (whole * PLANES * TILE);
    const int64_t next = std::min(group + 1, (layer.words() - 1) / whole);
    ahead = later < end ? start(group, later) : start(next, begin + later - end);
    const int64_t row = (group * layer.tiles() + tile) * (PLANES + 1) * TILE;
    if (layer.dtype == INT8) {
      const int8_t* bytes = (const int8_t*)layer.coefficients + row;
      const float* scales = layer.scales + tile * (PLANES + 1) * TILE;
      fill([&](int at) { return widen_bytes(bytes + at) * load<Floats>(scales + at); });
    } else {
      fill([&](int at) { return widen(layer.coefficients, row + at, layer.dtype); });
    }
  }

  /* Sets `c` to what `at(number)` gives, of LANES numbers of the tile. */
  template <class Numbers>
  void fill(Numbers at) {
    for (int i = 0; i < TILE / LANES; i++)
      for (int p = 0; p <= PLANES; p++) c[i].of[p] = at(p * TILE + i * LANES);
  }
};

/* Where each lane's low TABLE_BITS bits point to in `table`. */
inline Floats lookup(Floats table, Words index) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#elif defined(__AVX2__)
  return (Floats)_mm256_permutevar8x32_ps((__m256)table, (__m256i)index);
#else
  return (Floats)((Words)(table[1] + Floats{}) & -(index & 1));
#endif
}

/* What one thread knows of the tokens' inputs in one group, and how a tile uses it. */
template <int PLANES, class Input>
struct Lookup {
  static constexpr int TOKENS = 8;
  static constexpr int ROOM = (LANES == 16 ? 31 : 15) / (2 * PLANES) - 2;  // tokens whose sums stay in registers
  static constexpr int TOGETHER = ROOM >= 4 ? 4 : ROOM >= 2 ? 2 : 1;
  alignas(64) float table[TOKENS][MAX_GROUP / WORD * TABLES][LANES];
  float total[TOKENS];

  void take(int token, const Input* x, int words) {
    alignas(64) float values[MAX_GROUP];
    Floats sum = {};
    for (int i = 0; i < words * WORD; i += LANES) {
      const Floats v = widen(x, i, sizeof(Input) == 4 ? FLOAT32 : BFLOAT16);
      memcpy(values + i, &v, sizeof v);
      sum += v;
    }
    total[token] = 0;
    for (int lane = 0; lane < LANES; lane++) total[token] += sum[lane];
    Floats member[TABLE_BITS];  // 1 in the lanes whose number has this bit
    for (int bit = 0; bit < TABLE_BITS; bit++)
      for (int lane = 0; lane < LANES; lane++) member[bit][lane] = lane >> bit & 1;
    for (int word = 0; word < words; word++)
      for (int j = 0; j < TABLES; j++) {
        const float* first = values + word * WORD + j * TABLE_BITS;
        Floats sums = {};
        for (int bit = 0; bit < TABLE_BITS; bit++)
          if (j * TABLE_BITS + bit < WORD) sums += member[bit] * first[bit];
        memcpy(table[token][word * TABLES + j], &sums, sizeof sums);
      }
  }

  /* Adds the products of COUNT tokens from `first` to y, for the tile's registers `i` and i + 1. Inlined it would
     share its registers with its caller, and spill. */
  template <int COUNT>
  __attribute__((noinline)) void accumulate(const TileGroup<PLANES>& tile, int i, int first, float* y) const {
    Floats sums[COUNT][2][PLANES] = {};
    for (int word = 0; word < tile.words; word++) {
      const int64_t start = word * PLANES * TILE + i * LANES;
      Words bits[2][PLANES];
      for (int p = 0; p < PLANES; p++)
        for (int side = 0; side < 2; side++) {
          bits[side][p] = load<Words>(tile.planes + start + p * TILE + side * LANES);
          __builtin_prefetch(tile.ahead + start + p * TILE + side * LANES);
        }
#pragma GCC unroll 16
      for (int j = 0; j < TABLES; j++) {
#pragma GCC unroll 4
        for (int token = 0; token < COUNT; token++) {
          const Floats held = load<Floats>(table[first + token][word * TABLES + j]);
#pragma GCC unroll 8
          for (int n = 0; n < 2 * PLANES; n++)
            sums[token][n % 2][n / 2] += tile.c[i + n % 2].of[n / 2] * lookup(held, bits[n % 2][n / 2]);
        }
#pragma GCC unroll 8
        for (int n = 0; n < 2 * PLANES; n++) bits[n % 2][n / 2] >>= TABLE_BITS;
      }
    }
    for (int token = 0; token < COUNT; token++)
      for (int side = 0; side < 2; side++) {
        float* out = y + (first + token) * TILE + (i + side) * LANES;
        Floats result = load<Floats>(out) + tile.c[i + side].of[PLANES] * total[first + token];
        for (int p = 0; p < PLANES; p++) result += sums[token][side][p];
        memcpy(out, &result, sizeof result);
      }
  }

  void tile(const TileGroup<PLANES>& tile, int tokens, float* y) const {
    for (int i = 0; i < TILE / LANES; i += 2) {
      int token = 0;
      for (; token + TOGETHER <= tokens; token += TOGETHER) accumulate<TOGETHER>(tile, i, token, y);
      for (; token < tokens; token++) accumulate<1>(tile, i, token, y);
    }
  }
};

/* FIRST shifted left by 0 .. 31, in memory: the vector units load it without help of the integer units. */
template <uint32_t FIRST>
struct Shifted {
  uint32_t by[WORD] = {};
  constexpr Shifted() {
    for (int i = 0; i < WORD; i++) by[i] = FIRST << i;
  }
};
constexpr Shifted<1> BIT;
constexpr Shifted<0x10001> BIT_OF_BOTH_HALVES;

/* How Multiply holds weights and multiplies them: one input of fp32 at a time ... */
struct OneFloat {
  using Input = float;
  using Weights = Floats;
  using Activation = float;
  static constexpr int STEPS = WORD;  // per word
  static Weights round(Floats w) { return w; }
#if defined(__AVX512F__)
  using Mask = __mmask16;
  static Mask test(Words bits, int step) {
    return _mm512_test_epi32_mask((__m512i)bits, _mm512_set1_epi32(BIT.by[step]));
  }
  static Weights blend(Mask bit, Weights off, Weights on) { return _mm512_mask_blend_ps(bit, off, on); }
#elif defined(__AVX2__)
  using Mask = Words;
  static Mask test(Words bits, int step) { return bits << (31 - step); }  // blendv looks at the sign
  static Weights blend(Mask bit, Weights off, Weights on) { return _mm256_blendv_ps(off, on, (__m256)bit); }
#else
  using Mask = Words;
  static Mask test(Words bits, int step) { return (Words)((bits & BIT.by[step]) != 0); }
  static Weights blend(Mask bit, Weights off, Weights on) { return (Floats)(((Words)on & bit) | ((Words)off & ~bit)); }
#endif
  static Activation pick(const Input* x, int step) { return x[step]; }
  static Floats multiply(Floats sum, Weights w, Activation x) { return sum + w * x; }
};

#ifdef __AVX512BF16__
/* ... or two of bf16, from the two halves of a word. */
struct TwoBfloats {
  using Input = uint16_t;
  using Weights = __m512i;
  using Mask = __mmask32;
  using Activation = uint32_t;
  static constexpr int STEPS = WORD / 2;
  static Weights round(Floats w) {
    const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)w));
    return _mm512_or_si512(half, _mm512_slli_epi32(half, 16));
  }
  static Mask test(Words bits, int step) {
    return _mm512_test_epi16_mask((__m512i)bits, _mm512_set1_epi32(BIT_OF_BOTH_HALVES.by[step]));
  }
  static Weights blend(Mask bit, Weights off, Weights on) { return _mm512_mask_blend_epi16(bit, off, on); }
  static Activation pick(const Input* x, int step) { return x[step] | (uint32_t)x[step + STEPS] << 16; }
  static Floats multiply(Floats sum, Weights w, Activation x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(x));
  }
};
#endif

/* The weights of LANES outputs in one group. */
template <int PLANES, class Arithmetic>
struct Chooser {
  using Weights = typename Arithmetic::Weights;
  using Mask = typename Arithmetic::Mask;
  Weights level[1 << PLANES];  // bit p of the index = plane p

  explicit Chooser(const Coefficients<PLANES>& c) {
    Floats exact[1 << PLANES] = {c.of[PLANES]};
    for (int p = 0; p < PLANES; p++)
      for (int i = 0; i < 1 << p; i++) exact[i + (1 << p)] = exact[i] + c.of[p];
    for (int i = 0; i < 1 << PLANES; i++) level[i] = Arithmetic::round(exact[i]);
  }

  /* Those of inputs `step` of the word that starts at `planes`. */
  __attribute__((always_inline)) Weights at(const uint32_t* planes, int step) const {
    Mask bit[PLANES];
    for (int p = 0; p < PLANES; p++) bit[p] = Arithmetic::test(load<Words>(planes + p * TILE), step);
    return choose<PLANES>(level, bit);
  }

  template <int BITS>
  static Weights choose(const Weights* level, const Mask* bit) {
    if constexpr (BITS == 0)
      return level[0];
    else
      return Arithmetic::blend(bit[BITS - 1], choose<BITS - 1>(level, bit),
                               choose<BITS - 1>(level + (1 << (BITS - 1)), bit));
  }
};

template <int PLANES, class Arithmetic>
struct Multiply {
  static constexpr int ROW = LANES == 16 ? 8 : 4;  // tokens whose sums for two registers of outputs stay in registers
  static constexpr int TOKENS = 8 * ROW;
  static constexpr int STEPS = Arithmetic::STEPS;
  using Weights = typename Arithmetic::Weights;
  alignas(64) typename Arithmetic::Activation x[TOKENS / ROW][MAX_GROUP / WORD * STEPS][ROW];

  void take(int token, const typename Arithmetic::Input* values, int words) {
    for (int word = 0; word < words; word++)
      for (int step = 0; step < STEPS; step++)
        x[token / ROW][word * STEPS + step][token % ROW] = Arithmetic::pick(values + word * WORD, step);
  }

  struct Pair {
    Weights of[2];  // neighbouring registers of outputs
  };

  /* Adds the products of COUNT tokens from `first`, a multiple of 4, to y; `weights(word, step)` gives a Pair. */
  template <int COUNT, class Source>
  void accumulate(Source weights, int words, int first, float* y) const {
    Floats sums[COUNT][2];
    y += first * TILE;
#pragma GCC unroll 32
    for (int i = 0; i < 2 * COUNT; i++) sums[i / 2][i % 2] = load<Floats>(y + i / 2 * TILE + i % 2 * LANES);
    for (int word = 0; word < words; word++)
      for (int step = 0; step < STEPS; step++) {
        const Pair& w = weights(word, step);
        const auto* inputs = x[first / ROW][word * STEPS + step] + first % ROW;
#pragma GCC unroll 32
        for (int i = 0; i < 2 * COUNT; i++)
          sums[i / 2][i % 2] = Arithmetic::multiply(sums[i / 2][i % 2], w.of[i % 2], inputs[i / 2]);
      }
#pragma GCC unroll 32
    for (int i = 0; i < 2 * COUNT; i++) memcpy(y + i / 2 * TILE + i % 2 * LANES, &sums[i / 2][i % 2], sizeof(Floats));
  }

  void tile(const TileGroup<PLANES>& tile, int tokens, float* y) const {
    for (int i = 0; i < TILE / LANES; i += 2)
      two(tile.planes + i * LANES, &tile.c[i], tile.words, tokens, y + i * LANES);
  }

  void two(const uint32_t* planes, const Coefficients<PLANES>* c, int words, int tokens, float* y) const {
    const Chooser<PLANES, Arithmetic> left(c[0]), right(c[1]);
    const auto chosen = [&](int word, int step) __attribute__((always_inline)) {
      const uint32_t* start = planes + word * PLANES * TILE;
      return Pair{{left.at(start, step), right.at(start + LANES, step)}};
    };
    if (tokens <= 4) return accumulate<4>(chosen, words, 0, y);
    if (ROW >= 8 && PLANES <= 2 && tokens <= 8) return accumulate<8>(chosen, words, 0, y);
    Pair all[MAX_GROUP / WORD * STEPS];
    for (int word = 0; word < words; word++)
      for (int step = 0; step < STEPS; step++) all[word * STEPS + step] = chosen(word, step);
    const auto kept = [&](int word, int step) -> const Pair& { return all[word * STEPS + step]; };
    int token = 0;
    for (; tokens - token > ROW - 4; token += ROW) accumulate<ROW>(kept, words, token, y);
    for (; token < tokens; token += 4) accumulate<4>(kept, words, token, y);
  }
};

/* Tiles [first, last) of y [tokens, N] fp32, from x [tokens, K] with rows `stride` elements apart. */
template <int PLANES, class Kernel, class Input>
void run_tiles(const Layer& layer, const Input* x, int64_t stride, int64_t tokens, const float* bias, float* y,
               int64_t first, int64_t last) {
  constexpr int TOKENS = Kernel::TOKENS;
  struct Scratch {
    Kernel kernel;
    alignas(64) float sums[BLOCK][TOKENS][TILE];
  };
  const std::unique_ptr<Scratch> scratch(new Scratch);
  const int64_t group_words = layer.group_size / WORD;
  for (int64_t token = 0; token < tokens; token += TOKENS)
    for (int64_t block = first; block < last; block += BLOCK) {
      const int64_t end = std::min(block + BLOCK, last);
      const int count = std::min<int64_t>(TOKENS, tokens - token);
      for (auto& sums : scratch->sums) memset(sums, 0, count * sizeof *sums);
      for (int64_t word = 0, group = 0; word < layer.words(); word += group_words, group++) {
        const int words = std::min(group_words, layer.words() - word);
        for (int i = 0; i < count; i++) {
          Input values[MAX_GROUP] = {};
          const int64_t inputs = std::min<int64_t>(words * WORD, layer.in_features - word * WORD);
          memcpy(values, x + (token + i) * stride + word * WORD, inputs * sizeof(Input));
          scratch->kernel.take(i, values, words);
        }
        for (int64_t tile = block; tile < end; tile++) {
          const TileGroup<PLANES> held(layer, group, tile, block, end);
          scratch->kernel.tile(held, count, scratch->sums[tile - block][0]);
        }
      }
      for (int64_t tile = block; tile < end; tile++)
        for (int i = 0; i < count; i++) {
          float* out = y + (token + i) * layer.out_features + tile * TILE;
          const int lanes = std::min<int64_t>(TILE, layer.out_features - tile * TILE);
          for (int lane = 0; lane < lanes; lane++)
            out[lane] = scratch->sums[tile - block][i][lane] + (bias ? bias[tile * TILE + lane] : 0);
        }
    }
}

template <class Kernel, int PLANES, class Input>
void run(const Layer& layer, const Input* x, int64_t stride, int64_t tokens, const float* bias, float* y) {
#pragma omp parallel
  {
    const int64_t share = (layer.tiles() + omp_get_num_threads() - 1) / omp_get_num_threads();
    const int64_t first = std::min(share * omp_get_thread_num(), layer.tiles());
    run_tiles<PLANES, Kernel>(layer, x, stride, tokens, bias, y, first, std::min(first + share, layer.tiles()));
  }
}

template <int PLANES>
void run_planes(const Layer& layer, const void* x, bool bfloat, int64_t stride, int64_t tokens, const float* bias,
                float* y, bool few) {
  const float* floats = (const float*)x;
  const uint16_t* bfloats = (const uint16_t*)x;
#ifdef __AVX512BF16__
  if (bfloat && !few) return run<Multiply<PLANES, TwoBfloats>, PLANES>(layer, bfloats, stride, tokens, bias, y);
#endif
  if (bfloat) return run<Lookup<PLANES, uint16_t>, PLANES>(layer, bfloats, stride, tokens, bias, y);
  if (few) return run<Lookup<PLANES, float>, PLANES>(layer, floats, stride, tokens, bias, y);
  run<Multiply<PLANES, OneFloat>, PLANES>(layer, floats, stride, tokens, bias, y);
}

}  // namespace

/* y fp32 [tokens, N] = x [tokens, K] @ W.T + bias; x is bf16 where `bfloat`, else fp32; bias fp32 [N] or null, and so
   are the scales but of INT8. */
extern "C" void bpdq_linear(const uint32_t* planes, const char* coefficients, int dtype, const float* scales,
                            int64_t in_features, int64_t out_features, int64_t group_size, int64_t plane_count,
                            const void* x, bool bfloat, int64_t stride, int64_t tokens, const float* bias, float* y,
                            bool few) {
  const Layer layer{planes, coefficients, (Dtype)dtype, scales, in_features, out_features, group_size};
  if (plane_count == 1) run_planes<1>(layer, x, bfloat, stride, tokens, bias, y, few);
  if (plane_count == 2) run_planes<2>(layer, x, bfloat, stride, tokens, bias, y, few);
  if (plane_count == 3) run_planes<3>(layer, x, bfloat, stride, tokens, bias, y, few);
  if (plane_count == 4) run_planes<4>(layer, x, bfloat, stride, tokens, bias, y, few);
}

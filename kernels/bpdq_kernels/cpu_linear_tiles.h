/* Vectors of outputs, and what both kernels read of a layer: one tile in one group. */

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "cpu_linear_matrix.h"

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16, TABLE_BITS = 4;
#elif defined(__AVX2__)
constexpr int LANES = 8, TABLE_BITS = 3;
#define BPDQ_BYTES  // planes hold bytes together: `to_cpu_tiles` with `bytes`
#else
constexpr int LANES = 4, TABLE_BITS = 1;
#endif
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint8_t Octets __attribute__((vector_size(4 * LANES)));

constexpr int WORD = BPDQ_WORD, TILE = BPDQ_TILE, MAX_GROUP = BPDQ_MAX_GROUP, MAX_PLANES = BPDQ_MAX_PLANES;
static_assert(WORD == 8 * sizeof(uint32_t), "a lane holds one word");
static_assert(TILE % (2 * LANES) == 0, "tiles are pairs of registers");
constexpr int BLOCK = 64, FEW = 4;  // tiles between which a thread's tables and inputs stay in cache, and of few tokens
constexpr int TABLES = (WORD + TABLE_BITS - 1) / TABLE_BITS;  // per word

constexpr int AHEAD = 2048, LINE = 64;  // words of planes between those in use and those fetched; bytes of a fetch

/* How a kernel wants the planes of a tile: those that are multiplied, in words or with bytes together, or as they lie. */
enum Form { WORDS, BYTES, STORED };

template <class T>
inline T load(const void* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

/* Has memory bring a line that a token reads once: to the first cache, past the second where a CPU can. */
inline void fetch(const void* line) { __builtin_prefetch(line, 0, 0); }

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
  bool trellis;  // of the planes that are multiplied the first two are stored as one

  int64_t tiles() const { return (out_features + TILE - 1) / TILE; }
  int64_t words() const { return (in_features + WORD - 1) / WORD; }
  int64_t width() const { return dtype == FLOAT32 ? 4 : dtype == INT8 ? 1 : 2; }  // bytes of a coefficient

  /* Of experts, whose tensors follow each other, the one `index` places on; `plane_count` planes are multiplied. */
  Layer expert(int64_t index, int64_t plane_count) const {
    const int64_t outputs = tiles() * TILE, groups = (in_features + group_size - 1) / group_size;
    Layer other = *this;
    other.planes += index * words() * (plane_count - trellis) * outputs;
    other.coefficients += index * width() * groups * (plane_count + 1) * outputs;
    if (scales) other.scales += index * (plane_count + 1) * outputs;
    return other;
  }
};

/* Of LANES outputs in one group: those of the planes, then c0. */
template <int PLANES>
struct Coefficients {
  Floats of[PLANES + 1];
};

/* One group of `layer`'s inputs in the tiles from `begin` to `end`. */
template <int PLANES>
struct Group {
  const Layer& layer;
  int64_t begin, end, row, next_row;  // rows: of the coefficients of tile 0, here and in the next group
  int words, stored;                  // of the planes that lie there
  int64_t step, next_step;  // words of a tile, here and in the next group
  const uint32_t *planes, *next;
  int64_t ahead;  // tiles

  Group(const Layer& layer, int64_t group, int64_t begin, int64_t end) : layer(layer), begin(begin), end(end) {
    const int64_t whole = layer.group_size / WORD, tiles = layer.tiles();
    const int64_t following = std::min(group + 1, (layer.words() - 1) / whole);
    stored = PLANES - layer.trellis;
    words = words_of(group);
    step = words * stored * TILE, next_step = words_of(following) * stored * TILE;
    planes = layer.planes + group * whole * tiles * stored * TILE;
    next = layer.planes + following * whole * tiles * stored * TILE;
    ahead = AHEAD / (whole * stored * TILE);
    row = group * tiles * (PLANES + 1) * TILE, next_row = following * tiles * (PLANES + 1) * TILE;
  }

  int64_t words_of(int64_t group) const {
    const int64_t whole = layer.group_size / WORD;
    return std::min(whole, layer.words() - group * whole);
  }
};

/* What a layer has of one tile in one group: of the planes `stored`, and coefficients of PLANES that are multiplied.
   `ahead`: the planes to fetch from memory meanwhile, where groups follow each other. */
template <int PLANES>
struct TileGroup {
  int words, stored;
  const uint32_t *planes, *ahead;
  Coefficients<PLANES> c[TILE / LANES];

  __attribute__((always_inline)) TileGroup(const Group<PLANES>& group, int64_t tile) {
    words = group.words, stored = group.stored;
    planes = group.planes + tile * group.step;
    const Layer& layer = group.layer;
    const int64_t later = tile + group.ahead, beyond = group.begin + later - group.end, numbers = (PLANES + 1) * TILE;
    const bool here = later < group.end;
    ahead = here ? group.planes + later * group.step : group.next + beyond * group.next_step;
    const int64_t later_row = here ? group.row + later * numbers : group.next_row + beyond * numbers;
    for (int64_t at = 0; at < numbers * layer.width(); at += LINE)
      fetch(layer.coefficients + later_row * layer.width() + at);
    const int64_t row = group.row + tile * numbers;
    if (layer.dtype == INT8) {
      const int8_t* bytes = (const int8_t*)layer.coefficients + row;
      const float* scales = layer.scales + tile * numbers;
      fill([&](int at) { return widen_bytes(bytes + at) * load<Floats>(scales + at); });
    } else {
      fill([&](int at) { return widen(layer.coefficients, row + at, layer.dtype); });
    }
  }

  /* Room for what `as` makes. */
  struct Derived {
    alignas(64) uint32_t words[2][MAX_GROUP / WORD * PLANES * TILE];
  };

  /* Puts the planes in a form, where that is not how they lie. */
  template <Form FORM>
  void as(const Layer& layer, Derived& room) {
    if (FORM == STORED) return;
#ifdef BPDQ_BYTES
    if (FORM == WORDS) gather(room.words[0]);
    if (FORM == BYTES && layer.trellis) return expand_bytes(room.words[1]);
#endif
    if (layer.trellis) expand(room.words[1]);
  }

  /* Puts the planes that are multiplied at `to`, from trellis-coded ones (bpdq_kernels/trellis.py): a bit of their first
     is x_i, i the place in a chain, and z0_i = x_(i-1) and z1_i = x_i ^ x_(i-2) take its place. */
  void expand(uint32_t* to) {
    for (int word = 0; word < words; word++)
      for (int lane = 0; lane < TILE; lane += LANES) {
        const uint32_t* from = planes + word * stored * TILE + lane;
        const Words x = load<Words>(from);
        const auto put = [&](int plane, Words bits) {
          memcpy(to + (word * PLANES + plane) * TILE + lane, &bits, sizeof bits);
        };
        put(0, x << 1);
        if (PLANES > 1) put(1, x ^ x << 2);
        for (int p = 2; p < PLANES; p++) put(p, load<Words>(from + (p - 1) * TILE));
      }
    planes = to;
  }

#ifdef BPDQ_BYTES
  /* The same where the bytes of outputs lie together: what a shift moves out of a byte goes into the next. */
  void expand_bytes(uint32_t* to) {
    for (int word = 0; word < words; word++) {
      Octets before = {};
      for (int lane = 0; lane < TILE; lane += LANES) {
        const uint32_t* from = planes + word * stored * TILE + lane;
        const Octets x = load<Octets>(from);
        const auto put = [&](int plane, Octets bits) {
          memcpy(to + (word * PLANES + plane) * TILE + lane, &bits, sizeof bits);
        };
        put(0, x << 1 | before >> 7);
        if (PLANES > 1) put(1, x ^ (x << 2 | before >> 6));
        for (int p = 2; p < PLANES; p++) put(p, load<Octets>(from + (p - 1) * TILE));
        before = x;
      }
    }
    planes = to;
  }

  /* Puts words, which lie as bytes of all outputs, together at `to`. */
  void gather(uint32_t* to) {
    for (int word = 0; word < words * stored; word++) {
      const uint32_t* from = planes + word * TILE;
      __m256i byte[4], pair[4];
      for (int i = 0; i < 4; i++) byte[i] = load<__m256i>(from + i * LANES);
      for (int i = 0; i < 2; i++) {
        pair[i] = _mm256_unpacklo_epi8(byte[2 * i], byte[2 * i + 1]);
        pair[i + 2] = _mm256_unpackhi_epi8(byte[2 * i], byte[2 * i + 1]);
      }
      for (int i = 0; i < 4; i++) {
        const __m256i *of = pair + i / 2 * 2;
        const __m256i whole = i % 2 ? _mm256_unpackhi_epi16(of[0], of[1]) : _mm256_unpacklo_epi16(of[0], of[1]);
        memcpy(to + word * TILE + i * LANES, &whole, sizeof whole);
      }
    }
    planes = to;
  }
#endif

  /* Sets `c` to what `at(number)` gives, of LANES numbers of the tile. */
  template <class Numbers>
  void fill(Numbers at) {
    for (int i = 0; i < TILE / LANES; i++)
      for (int p = 0; p <= PLANES; p++) c[i].of[p] = at(p * TILE + i * LANES);
  }
};

}  // namespace

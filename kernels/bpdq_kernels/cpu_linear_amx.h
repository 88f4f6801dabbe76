/* Many tokens in bf16 on AMX: eight tiles of 16 rows of 64 bytes, and one instruction that adds the products of two.

   The weights of a word and 16 outputs, as cpu_linear_multiply.h makes them, are a tile: row j has inputs j and j + 16 of
   all outputs beside each other. So are 16 tokens' inputs of a word, a row each, and 16 tokens' sums of 16 outputs:

     sums += inputs x weights                                         16 x 16 sums, 32 inputs each, in 16 cycles

   No machine with AMX was at hand: with BPDQ_EMULATED_TILES, for tests, tiles are arrays and the instruction is a loop. */

#pragma once

#include <atomic>

#include "cpu_linear_multiply.h"

#if defined(__AMX_BF16__) || defined(BPDQ_EMULATED_TILES)
#define BPDQ_AMX

namespace {

/* What ldtilecfg reads: eight tiles of 16 rows of 64 bytes. */
struct alignas(64) TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileShapes) == 64);
constexpr TileShapes SHAPES = {
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16},
};

#ifndef __AMX_BF16__
struct EmulatedTiles {
  bool is_loaded = false;
  uint32_t of[8][16][16];

  void load(int tile, const void* from, int64_t stride) {
    for (int row = 0; row < 16; row++) memcpy(of[tile][row], (const char*)from + row * stride, 64);
  }
  void store(int tile, void* to, int64_t stride) const {
    for (int row = 0; row < 16; row++) memcpy((char*)to + row * stride, of[tile][row], 64);
  }
  void multiply(int sums, int a, int b) {
    if (!is_loaded) abort();  // as the instruction would
    for (int row = 0; row < 16; row++)
      for (int column = 0; column < 16; column++) {
        float sum = load_float(of[sums][row][column]);
        for (int pair = 0; pair < 16; pair++) {
          const uint32_t x = of[a][row][pair], y = of[b][pair][column];
          sum += load_float(x << 16) * load_float(y << 16);
          sum += load_float(x & 0xffff0000) * load_float(y & 0xffff0000);
        }
        memcpy(&of[sums][row][column], &sum, sizeof sum);
      }
  }
  static float load_float(uint32_t bits) { return ::load<float>(&bits); }
};
thread_local EmulatedTiles emulated;
#define _tile_loadconfig(shapes) emulated.is_loaded = true
#define _tile_release() emulated.is_loaded = false
#define _tile_loadd(tile, from, stride) emulated.load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated.store(tile, to, stride)
#define _tile_dpbf16ps(sums, a, b) emulated.multiply(sums, a, b)
#endif

/* To be made by the thread that uses it. */
template <int PLANES>
struct MultiplyTiles : Multiply<PLANES, TwoBfloats> {
  using Multiplied = Multiply<PLANES, TwoBfloats>;
  static constexpr int AT_ONCE = 32, STEPS = Multiplied::STEPS;  // tokens in two tiles
  static_assert(STEPS == 16 && LANES == 16 && Multiplied::TOKENS % AT_ONCE == 0);

  MultiplyTiles() { _tile_loadconfig(&SHAPES); }
  ~MultiplyTiles() { _tile_release(); }

  /* As Multiply's. */
  void tile(const TileGroup<PLANES>& tile, int tokens, float* y, int first, bool is_last) {
    this->make(tile, first);
    if (!is_last) return;
    for (int i = 0; i < TILE / LANES; i += 2)
      for (int token = 0; token < tokens; token += AT_ONCE)
        accumulate(this->weights[i / 2], first + tile.words, token, y + token * TILE + i * LANES);
  }

  /* Adds the products of AT_ONCE tokens from `token` on to y. */
  void accumulate(const typename Multiplied::Pair* pairs, int words, int token, float* y) const {
    constexpr int64_t OF_SUMS = TILE * sizeof *y, OF_INPUTS = sizeof *this->x, OF_WEIGHTS = sizeof *pairs;
    float* next = y + AT_ONCE / 2 * TILE;
    std::atomic_signal_fence(std::memory_order_seq_cst);  // g++ does not know that tiles are loaded from memory
    _tile_loadd(0, y, OF_SUMS);
    _tile_loadd(1, y + LANES, OF_SUMS);
    _tile_loadd(2, next, OF_SUMS);
    _tile_loadd(3, next + LANES, OF_SUMS);
    for (int word = 0; word < words; word++) {
      _tile_loadd(4, this->x[token] + word * STEPS, OF_INPUTS);
      _tile_loadd(5, this->x[token + AT_ONCE / 2] + word * STEPS, OF_INPUTS);
      _tile_loadd(6, pairs[word * STEPS].of, OF_WEIGHTS);
      _tile_loadd(7, pairs[word * STEPS].of + 1, OF_WEIGHTS);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, y, OF_SUMS);
    _tile_stored(1, y + LANES, OF_SUMS);
    _tile_stored(2, next, OF_SUMS);
    _tile_stored(3, next + LANES, OF_SUMS);
  }
};

}  // namespace
#endif

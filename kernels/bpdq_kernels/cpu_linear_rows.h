/* Single rows of W, as an embedding looks them up. */

#pragma once

#include "cpu_linear_tiles.h"

namespace {

/* The word of output `lane` of a tile, of one plane's TILE words from `plane` on. */
inline uint32_t word_of(const uint32_t* plane, int lane) {
#ifdef BPDQ_BYTES
  const uint8_t* bytes = (const uint8_t*)plane + 16 * (lane / 4 % 2) + 4 * (lane / 8) + lane % 4;
  return bytes[0] | bytes[TILE] << 8 | bytes[2 * TILE] << 16 | (uint32_t)bytes[3 * TILE] << 24;
#else
  return plane[lane];
#endif
}

/* Coefficient `p`, of `planes` and c0, of an output in a tile and group. */
inline float coefficient_of(const Layer& layer, int64_t planes, int64_t group, int64_t output, int64_t p) {
  const int64_t tile = output / TILE, lane = output % TILE;
  const int64_t of_tile = (tile * (planes + 1) + p) * TILE + lane / LANES * LANES;
  const int64_t at = group * layer.tiles() * (planes + 1) * TILE + of_tile;
  Floats values;
  if (layer.dtype == INT8)
    values = widen_bytes((const int8_t*)layer.coefficients + at) * load<Floats>(layer.scales + of_tile);
  else
    values = widen(layer.coefficients, at, layer.dtype);
  return values[lane % LANES];
}

/* Calls `write(input, weight)` for all inputs of an output. Weights are summed in the order of reference.py, so that
   they are the same to the bit; `planes` of them are multiplied. */
template <class Write>
void weights_of(const Layer& layer, int planes, int64_t output, Write write) {
  const int64_t whole = layer.group_size / WORD, tiles = layer.tiles();
  const int stored = planes - layer.trellis, lane = output % TILE;
  for (int64_t first = 0, group = 0; first < layer.words(); first += whole, group++) {
    float levels[1 << MAX_PLANES] = {coefficient_of(layer, planes, group, output, planes)};
    for (int p = 0; p < planes; p++) {
      const float c = coefficient_of(layer, planes, group, output, p);
      for (int code = 0; code < 1 << p; code++) levels[code | 1 << p] = levels[code] + c;
    }
    const int64_t words = std::min(whole, layer.words() - first);
    const uint32_t* of_tile = layer.planes + (first * tiles + output / TILE * words) * stored * TILE;
    for (int64_t word = 0; word < words; word++) {
      uint32_t bits[MAX_PLANES + 1];
      for (int p = 0; p < stored; p++)
        bits[p + layer.trellis] = word_of(of_tile + (word * stored + p) * TILE, lane);
      if (layer.trellis) {  // as TileGroup::expand
        const uint32_t x = bits[1];
        bits[0] = x << 1, bits[1] = x ^ x << 2;
      }
      for (int i = 0; i < WORD; i++) {
        const int place = !layer.trellis ? i : i < WORD / 2 ? 2 * i : 2 * i - WORD + 1;
        const int64_t input = (first + word) * WORD + place;
        int code = 0;
        for (int p = 0; p < planes; p++) code |= (bits[p] >> i & 1) << p;
        if (input < layer.in_features) write(input, levels[code]);
      }
    }
  }
}

}  // namespace

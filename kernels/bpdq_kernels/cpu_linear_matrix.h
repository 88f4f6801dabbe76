/* What a caller hands over of a layer: `_Matrix` of cpu.py. */

#pragma once

#include <cstdint>

namespace {

enum Dtype { FLOAT32, FLOAT16, BFLOAT16, INT8 };

/* A matrix of experts, or of the one that a Linear is; bias [E, N] or null. */
struct Matrix {
  const uint32_t* planes;
  const char* coefficients;
  const float *scales, *bias;
  int64_t dtype, in_features, out_features, group_size, plane_count;  // planes as stored
  bool trellis;

  int64_t multiplied() const { return plane_count + trellis; }
};

}  // namespace

extern "C" {
/* y [rows, N] = x @ W.T + bias, both of `dtype`, fp32 or 16 bits; rows of x are `stride` elements apart. Only INT8 has
   scales, others null. Up to `few` rows are looked up; below 0: as many as suits. */
void bpdq_linear(const Matrix* matrix, const void* x, int64_t dtype, int64_t stride, int64_t rows, int64_t few,
                 void* y);

/* y [rows, K], of `dtype`: the rows of W that `ids` names, each of an output. */
void bpdq_rows(const Matrix* matrix, const int64_t* ids, int64_t rows, int64_t dtype, void* y);
}

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

/* y [tokens, N of down] = the sum over `choices` of weights * (down(act(up(x))) + bias) of the expert in ids, where it
   is in [0, experts). x, y and the activation's output are of `dtype`; rows of x are `stride` elements apart; weights
   [tokens, choices] multiply x instead where they are `weights_on_input`. activation: its place in activation.NAMES.
   Planes, coefficients, scales and biases of experts follow each other. few: as above. */
void bpdq_experts(const Matrix* up, const Matrix* down, int64_t experts, const void* x, int64_t dtype, int64_t stride,
                  const int64_t* ids, const float* weights, int64_t tokens, int64_t choices, int64_t activation,
                  float alpha, float limit, bool weights_on_input, int64_t few, void* y);
}

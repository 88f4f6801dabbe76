/* `bpdq::linear` and `bpdq::embedding` for CPU tensors, called without Python: that takes 5 us instead of 15.

   Only the stable part of torch's C++ interface, of 2.10, so that this compiles in a second or two. The kernels are
   those of cpu_linear.cpp, whose library cpu.py names by `bpdq_use`. */

#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu_linear_matrix.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> Maybe;

/* Those of the instruction set in use; few: as `bpdq_linear` takes it. */
struct {
  decltype(bpdq_linear)* linear;
  decltype(bpdq_rows)* rows;
  int64_t few;
} kernels;

int64_t dtype_code(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return FLOAT32;
    case ScalarType::Half:
      return FLOAT16;
    case ScalarType::BFloat16:
      return BFLOAT16;
    default:
      STD_TORCH_CHECK(type == ScalarType::Char, "bpdq: fp32, fp16, bf16 or int8 was expected");
      return INT8;
  }
}

Matrix matrix_of(const Tensor& planes, const Tensor& coefficients, const Maybe& scales, int64_t in_features,
                 int64_t out_features, int64_t group_size) {
  const int64_t stored = planes.size(planes.dim() - 2), rows = coefficients.size(coefficients.dim() - 2);
  Matrix matrix = {};
  matrix.planes = (const uint32_t*)planes.data_ptr();
  matrix.coefficients = (const char*)coefficients.data_ptr();
  matrix.scales = scales ? (const float*)scales->data_ptr() : nullptr;
  matrix.dtype = dtype_code(coefficients.scalar_type());
  matrix.in_features = in_features, matrix.out_features = out_features, matrix.group_size = group_size;
  matrix.plane_count = stored, matrix.trellis = rows == stored + 2;
  return matrix;
}

Tensor linear(Tensor x, Tensor planes, Tensor coefficients, Maybe scales, Maybe, int64_t out_features,
              int64_t group_size, Maybe bias) {
  const int64_t in_features = x.size(x.dim() - 1), rows = in_features ? x.numel() / in_features : 0;
  const bool is_matrix = x.dim() == 2 && x.stride(1) == 1;
  if (!is_matrix) x = torch::stable::contiguous(x);
  if (bias) bias = torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
  Matrix matrix = matrix_of(planes, coefficients, scales, in_features, out_features, group_size);
  matrix.bias = bias ? (const float*)bias->data_ptr() : nullptr;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = torch::stable::new_empty(x, sizes);
  kernels.linear(&matrix, x.data_ptr(), dtype_code(x.scalar_type()), is_matrix ? x.stride(0) : in_features, rows,
                 kernels.few, y.data_ptr());
  return y;
}

Tensor embedding(Tensor ids, Tensor planes, Tensor coefficients, Maybe scales, Maybe, int64_t in_features,
                 int64_t group_size, ScalarType dtype) {
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(in_features);
  ids = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
  const int64_t count = ids.numel(), outputs = planes.size(planes.dim() - 1);
  const int64_t* numbers = (const int64_t*)ids.data_ptr();
  for (int64_t i = 0; i < count; i++)
    STD_TORCH_CHECK(numbers[i] >= 0 && numbers[i] < outputs, "bpdq: token id ", numbers[i], " of ", outputs);
  const Matrix matrix = matrix_of(planes, coefficients, scales, in_features, outputs, group_size);
  Tensor y = torch::stable::new_empty(planes, sizes, dtype);
  kernels.rows(&matrix, numbers, count, dtype_code(dtype), y.data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bpdq, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("embedding", TORCH_BOX(&embedding));
}

/* Called before the first tensor comes. */
extern "C" void bpdq_use(decltype(bpdq_linear)* linear, decltype(bpdq_rows)* rows, int64_t few) {
  kernels = {linear, rows, few};
}

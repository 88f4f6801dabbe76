/* `bpdq::linear`, `bpdq::embedding` and `bpdq::moe` for CPU tensors, called without Python: that takes 5 us instead of
   15, and experts 30 us less.

   Only the stable part of torch's C++ interface, of 2.10, so that this compiles in a second or two. The kernels are
   those of cpu_linear.cpp, whose library cpu.py names by `bpdq_use`. */

#include <optional>
#include <string>
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
  decltype(bpdq_experts)* experts;
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

int64_t activation_code(ScalarType type) {
  STD_TORCH_CHECK(type != ScalarType::Char, "bpdq: fp32, fp16 or bf16 was expected");
  return dtype_code(type);
}

Matrix matrix_of(const Tensor& planes, const Tensor& coefficients, const Maybe& scales, int64_t in_features,
                 int64_t out_features, int64_t group_size) {
  const int64_t stored = planes.size(planes.dim() - 2), rows = coefficients.size(coefficients.dim() - 2);
  const int64_t words = planes.size(planes.dim() - 3), outputs = planes.size(planes.dim() - 1);
  const int64_t groups = coefficients.size(coefficients.dim() - 3);
  STD_TORCH_CHECK(words == (in_features + 31) / 32 && groups == (in_features + group_size - 1) / group_size &&
                      out_features <= outputs,
                  "bpdq: ", words, " words and ", groups, " groups of ", outputs, " outputs are no matrix of ",
                  in_features, " inputs and ", out_features, " outputs");
  Matrix matrix = {};
  matrix.planes = (const uint32_t*)planes.data_ptr();
  matrix.coefficients = (const char*)coefficients.data_ptr();
  matrix.scales = scales ? (const float*)scales->data_ptr() : nullptr;
  matrix.dtype = dtype_code(coefficients.scalar_type());
  matrix.in_features = in_features, matrix.out_features = out_features, matrix.group_size = group_size;
  matrix.plane_count = stored, matrix.trellis = rows == stored + 2;
  return matrix;
}

Maybe as_floats(const Maybe& bias, int64_t count) {
  if (!bias) return bias;
  STD_TORCH_CHECK(bias->numel() == count, "bpdq: a bias of ", bias->numel(), " numbers for ", count, " outputs");
  return torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float));
}

Tensor linear(Tensor x, Tensor planes, Tensor coefficients, Maybe scales, Maybe, int64_t out_features,
              int64_t group_size, Maybe bias) {
  const int64_t in_features = x.size(x.dim() - 1), rows = in_features ? x.numel() / in_features : 0;
  const bool is_matrix = x.dim() == 2 && x.stride(1) == 1;
  if (!is_matrix) x = torch::stable::contiguous(x);
  bias = as_floats(bias, out_features);
  Matrix matrix = matrix_of(planes, coefficients, scales, in_features, out_features, group_size);
  matrix.bias = bias ? (const float*)bias->data_ptr() : nullptr;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = out_features;
  Tensor y = torch::stable::new_empty(x, sizes);
  kernels.linear(&matrix, x.data_ptr(), activation_code(x.scalar_type()), is_matrix ? x.stride(0) : in_features, rows,
                 kernels.few, y.data_ptr());
  return y;
}

Tensor embedding(Tensor ids, Tensor planes, Tensor coefficients, Maybe scales, Maybe, int64_t in_features,
                 int64_t outputs, int64_t group_size, ScalarType dtype) {
  std::vector<int64_t> sizes(ids.sizes().begin(), ids.sizes().end());
  sizes.push_back(in_features);
  ids = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
  const int64_t count = ids.numel();
  const int64_t* numbers = (const int64_t*)ids.data_ptr();
  for (int64_t i = 0; i < count; i++)
    STD_TORCH_CHECK(numbers[i] >= 0 && numbers[i] < outputs, "bpdq: token id ", numbers[i], " of ", outputs);
  const Matrix matrix = matrix_of(planes, coefficients, scales, in_features, outputs, group_size);
  Tensor y = torch::stable::new_empty(planes, sizes, dtype);
  kernels.rows(&matrix, numbers, count, activation_code(dtype), y.data_ptr());
  return y;
}

const char* const ACTIVATIONS[] = {"silu",         "gelu",        "gelu_tanh",  "swigluoai",
                                   "relu2_no_mul", "silu_no_mul", "gelu_no_mul"};  // as activation.NAMES

int64_t number_of(const std::string& activation) {
  int64_t number = 0;
  for (const char* name : ACTIVATIONS) {
    if (activation == name) return number;
    number++;
  }
  STD_TORCH_CHECK(false, "bpdq: activation ", activation, " is not known");
}

Tensor moe(Tensor x, Tensor weights, Tensor ids, Tensor up_planes, Tensor up_coefficients, Maybe up_scales, Maybe,
           int64_t up_inputs, int64_t up_outputs, int64_t up_group_size, Tensor down_planes, Tensor down_coefficients,
           Maybe down_scales, Maybe, int64_t down_inputs, int64_t down_outputs, int64_t down_group_size, Maybe up_bias,
           Maybe down_bias, std::string activation, double alpha, double limit, bool weights_on_input) {
  if (x.stride(1) != 1) x = torch::stable::contiguous(x);
  weights = torch::stable::contiguous(torch::stable::to(weights, ScalarType::Float));
  ids = torch::stable::contiguous(torch::stable::to(ids, ScalarType::Long));
  const int64_t experts = up_planes.size(0);
  STD_TORCH_CHECK(down_planes.size(0) == experts, "bpdq: ", experts, " experts, and ", down_planes.size(0), " of down");
  up_bias = as_floats(up_bias, experts * up_outputs), down_bias = as_floats(down_bias, experts * down_outputs);
  Matrix up = matrix_of(up_planes, up_coefficients, up_scales, up_inputs, up_outputs, up_group_size);
  Matrix down = matrix_of(down_planes, down_coefficients, down_scales, down_inputs, down_outputs, down_group_size);
  up.bias = up_bias ? (const float*)up_bias->data_ptr() : nullptr;
  down.bias = down_bias ? (const float*)down_bias->data_ptr() : nullptr;
  Tensor y = torch::stable::new_empty(x, {x.size(0), down_outputs});
  kernels.experts(&up, &down, experts, x.data_ptr(), activation_code(x.scalar_type()), x.stride(0),
                  (const int64_t*)ids.data_ptr(), (const float*)weights.data_ptr(), ids.size(0), ids.size(1),
                  number_of(activation), alpha, limit, weights_on_input, kernels.few, y.data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bpdq, CPU, library) {
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("embedding", TORCH_BOX(&embedding));
  library.impl("moe", TORCH_BOX(&moe));
}

/* Called before the first tensor comes. */
extern "C" void bpdq_use(decltype(bpdq_linear)* linear, decltype(bpdq_rows)* rows, decltype(bpdq_experts)* experts,
                         int64_t few) {
  kernels = {linear, rows, experts, few};
}

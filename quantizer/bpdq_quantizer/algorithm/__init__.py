"""The algorithm: a weight and the Hessian of its inputs become bit-planes and coefficients. Tensors in, tensors out."""

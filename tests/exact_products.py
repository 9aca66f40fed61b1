"""Products and sums of Triton's interpreter whose order no library decides. Imported by conftest.

The interpreter multiplies with numpy. Its BLAS picks an order of summation by the CPU, by the shape and by
the row in a tile. The bits and the size of an error would be the CPU's, not the kernel's.

Here every product is formed in float64 and rounded once to the type of the accumulator. The float64 sum of
products of 16-bit numbers is exact unless they differ by more than 2^50, so its order cannot show. The
additions between two products are the kernel's own and stay as they are.

The same holds for a sum over a tile of fp32: numpy adds its rows one after another, a GPU as a tree. A sum of
16-bit numbers stays in 16 bits, because that would be a wrong accumulator.
"""

import exact_bf16
import numpy as np
from triton.runtime import interpreter


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    a, b = exact_bf16.widened(a), exact_bf16.widened(b)
    product = np.matmul(a, b, dtype=np.float64).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _sum(self, input):
    data = input.handle.data
    wide = np.float64 if data.dtype == np.float32 else None
    total = np.sum(data, axis=self.axis, keepdims=self.keep_dims, dtype=wide)
    return self.to_tensor(total.astype(data.dtype) if wide else total, input.dtype)


def install() -> None:
    interpreter.InterpreterBuilder.create_dot = _dot
    interpreter.ReduceOps.sum = _sum

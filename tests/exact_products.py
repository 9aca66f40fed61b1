"""Matrix products of Triton's interpreter that no BLAS decides. Imported by conftest.

The interpreter multiplies with numpy. Its BLAS picks an order of summation by the CPU, by the shape and by
the row in a tile. The bits and the size of an error would be the CPU's, not the kernel's.

Here every product is formed in float64 and rounded once to the type of the accumulator. The float64 sum of
products of 16-bit numbers is exact unless they differ by more than 2^50, so its order cannot show. The
additions between two products are the kernel's own and stay as they are.
"""

import numpy as np
from triton.runtime import interpreter


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    product = np.matmul(a.data, b.data, dtype=np.float64).astype(d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def install() -> None:
    interpreter.InterpreterBuilder.create_dot = _dot

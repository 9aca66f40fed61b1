"""bf16 in Triton 3.7.1's interpreter, rounded as on a GPU. Imported by conftest.

The interpreter keeps a bf16 number as its 16 bits in an integer. Its cast from fp32 cuts the other bits off,
and it adds, compares and multiplies the bits as integers. Nothing of that is an error.

Here:

- A cast from fp32 rounds to nearest, ties to even. A cast to fp32 is exact.
- `+ - * / %` and comparisons of bf16 take both operands to fp32 and round the result once. That equals one
  operation in bf16, because fp32 has more than twice its bits.
- A product takes its operands exactly (`exact_products`).
- Loads, stores and all that only moves numbers (`tl.where`, reshapes, descriptors) move the bits as before.
- Triton itself takes `tl.maximum`, `tl.max` and the like to fp32, and refuses bf16 in `tl.exp2` and the like.
- The rest is refused, so that nothing can be silently wrong. The kernels do not use it.

With that `ops` lets bf16 tensors in, too.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from nvembed_fast import ops

IS_EXACT = triton.__version__ == "3.7.1"
WHY_NOT = "bf16 in the interpreter needs triton 3.7.1"
SHIPPED_DTYPES = ops.INTERPRETED_DTYPES


def widened(handle: interpreter.TensorHandle) -> np.ndarray:
    """The numbers of a tensor: those of a bf16 tensor in fp32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle.data
    return (handle.data.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: np.ndarray) -> interpreter.TensorHandle:
    """A bf16 tensor of the fp32 numbers, to nearest, ties to even."""
    bits = np.atleast_1d(numbers).view(np.uint32)
    bits = np.where(np.isnan(numbers), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    return interpreter.TensorHandle(bits.astype(np.uint16), tl.bfloat16)


def _cast(original, self, src, dst_type):
    if src.dtype.scalar == tl.bfloat16:
        src = interpreter.TensorHandle(widened(src), tl.float32)
    if dst_type.scalar == tl.bfloat16:
        return rounded(src.data.astype(np.float32))
    return original(self, src, dst_type)


def _binary(original, self, lhs, rhs, op):
    if lhs.dtype.scalar != tl.bfloat16:
        return original(self, lhs, rhs, op)
    result = op(widened(lhs), widened(rhs))
    return interpreter.TensorHandle(result, tl.int1) if result.dtype == bool else rounded(result)


def _is_bf16(argument) -> bool:
    if isinstance(argument, tuple):
        return any(map(_is_bf16, argument))
    handle = getattr(argument, "handle", argument)
    return isinstance(handle, interpreter.TensorHandle) and handle.get_element_ty() == tl.bfloat16


def _refusing(original, self, *args):
    if any(map(_is_bf16, args)):
        raise NotImplementedError(f"{original.__name__} of bf16 is not emulated: cast to fp32 before it")
    return original(self, *args)


def install() -> None:
    def wrap(owner, name, replacement):
        original = getattr(owner, name)
        setattr(owner, name, lambda self, *args: replacement(original, self, *args))

    builder = interpreter.InterpreterBuilder
    builder.get_bf16 = lambda self, value: rounded(np.array([value], np.float32))
    wrap(builder, "cast_impl", _cast)
    wrap(builder, "binary_op", _binary)
    for name in ("create_fma", "create_fp_to_fp", "create_atomic_rmw", "create_atomic_cas", "unary_op"):
        wrap(builder, name, _refusing)
    wrap(interpreter.ReduceOps, "sum", _refusing)
    wrap(interpreter.ScanOps, "apply_impl", _refusing)
    ops.INTERPRETED_DTYPES = (*SHIPPED_DTYPES, torch.bfloat16)

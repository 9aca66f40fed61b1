"""Triton's interpreter without what it does anew for every call. Imported by conftest; it changes no result.

A quarter of a kernel's time went into replacing the functions of `triton.language`, once more with each call
of a device function. Much of the rest went into types, though its many thousand tensors are of few. A run
of 20 gradients of attention took 12.3 s of CPU time in the place of 18.3, with its start (2026-11-27, AMD
EPYC, Triton 3.7.1).
"""

import functools
import threading

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

REPLACED = []  # (owner, name, original)


def _replace(owner, name, replacement) -> None:
    REPLACED.append((owner, name, getattr(owner, name)))
    setattr(owner, name, replacement)


def _patch_once_per_launch() -> None:
    """Functions of one module see the same `triton.language`, which stays replaced to the launch's end."""
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    here = threading.local()  # `modules` that are patched, during a launch of this thread

    def patch_once(fn):
        modules = getattr(here, "modules", set())
        if fn.__module__ in modules:
            return None  # the scope, which is used at a launch alone
        modules.add(fn.__module__)
        return patch(fn)

    def launch_anew(*args, **kwargs):
        here.modules = set()
        try:
            return launch(*args, **kwargs)
        finally:
            del here.modules

    _replace(interpreter, "_patch_lang", patch_once)
    _replace(interpreter.GridExecutor, "__call__", launch_anew)


def _make_types_once() -> None:
    dtype = functools.cache(interpreter._get_np_dtype)
    shared = functools.cache(lambda element, shape: tl.block_type(element, list(shape)))
    init = tl.tensor.__init__

    def np_dtype(type):
        return np.dtype(np.uint64) if type.scalar.is_ptr() else dtype(type.scalar)

    def block(element, shape):
        if not isinstance(element, tl.dtype) or element.is_ptr():  # which has no hash
            return tl.block_type(element, shape)
        return shared(element, tuple(shape))

    def init_once_per_type(self, handle, type):
        if not hasattr(type, "of_tensors"):
            init(self, None, type)
            type.of_tensors = dict(vars(self))
        vars(self).update(type.of_tensors, handle=handle)

    _replace(interpreter, "_get_np_dtype", np_dtype)
    _replace(interpreter.InterpreterBuilder, "get_block_ty", lambda self, *type: block(*type))
    _replace(tl.block_type, "with_element_ty", lambda self, element: block(element, self.shape))
    _replace(tl.tensor, "__init__", init_once_per_type)


def install() -> None:
    _patch_once_per_launch()
    _make_types_once()

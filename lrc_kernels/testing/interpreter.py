# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter (TRITON_INTERPRET=1) safe to test with on a machine without a GPU.

In: kernels as they are. Out: `tl.dot` on bf16/fp16 operands gives the right numbers, casts to bf16 round as a GPU does,
any other bf16 arithmetic raises instead of giving wrong numbers silently, `@triton.autotune` runs its first
configuration without a driver, and the programs of a launch run in a random order, so that a kernel in which one
program waits for what another writes fails here as it would on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np

_MISSING = "triton is not installed (pip install lrc-kernels[triton])"
_installed = False


class Bfloat16ArithmeticError(TypeError):
    """Raised where the interpreter would compute on the bits of bf16 values as if they were integers."""


def install_interpreter() -> str | None:
    """Switch the interpreter on and repair it: sets TRITON_INTERPRET=1, so call it before importing any kernel module.

    Leaves a value of TRITON_INTERPRET that the user has set; calling it again changes nothing.

    Returns:
        None, or the reason why Triton kernels cannot be interpreted here.
    """
    global _installed
    if importlib.util.find_spec("triton") is None:
        return _MISSING
    if os.environ.setdefault("TRITON_INTERPRET", "1") != "1":
        return f"TRITON_INTERPRET={os.environ['TRITON_INTERPRET']} is set"
    if not _installed:
        interpreter = importlib.import_module("triton.runtime.interpreter")
        _repair_dot(interpreter)
        _repair_cast(interpreter)
        _repair_index(interpreter)
        _refuse_bfloat16(interpreter)
        _shuffle_programs(interpreter.InterpreterBuilder)
        _tune_without_driver(importlib.import_module("triton.runtime.autotuner").Autotuner)
        _installed = True
    return None


def _is_bfloat16(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return str(getattr(dtype, "scalar", dtype)) == "bf16"


def _refuse(operation: str) -> None:
    raise Bfloat16ArithmeticError(f"{operation} on bf16 is wrong in Triton's interpreter: cast to tl.float32 first")


def _repair_dot(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.create_dot

    def widened(operand: Any) -> Any:
        if _is_bfloat16(operand):
            bits = np.ascontiguousarray(operand.data).view(np.uint16).astype(np.uint32) << 16
            return handle(bits.view(np.float32), tl.float32)
        # numpy multiplies fp16 matrices element by element; through fp32 it calls BLAS.
        if operand.dtype.scalar == tl.float16:
            return handle(operand.data.astype(np.float32), tl.float32)
        return operand

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if _is_bfloat16(d):
            _refuse("tl.dot with an accumulator")
        return original(self, widened(a), widened(b), d, *rest)

    builder.create_dot = create_dot


def _repair_cast(interpreter: Any) -> None:
    """fp32 -> bf16 to nearest even: the interpreter cuts the low bits off."""
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    original = builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if (src.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return original(self, src, dst_type)
        bits = np.ascontiguousarray(src.data).view(np.uint32)
        nearest = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # The sum may carry a NaN over into the sign; its highest payload bit alone keeps it one.
        rounded = np.where(np.isnan(src.data), (bits >> 16) | 0x40, nearest).astype(np.uint16)
        return handle(rounded.reshape(src.data.shape), tl.bfloat16)

    builder.cast_impl = cast_impl


def _repair_index(interpreter: Any) -> None:
    """A scalar of a kernel is an array of one element, which Triton before 3.7 hands to int() and NumPy 2.4 refuses."""
    original = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *scope: Any) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _refuse_bfloat16(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    for name in (
        "binary_op",
        "unary_op",
        "ternary_op",
        "create_fma",
        "create_rsqrt",
        "create_erf",
        "create_atomic_rmw",
    ):
        if hasattr(builder, name):
            setattr(builder, name, _guarded(getattr(builder, name), name.removeprefix("create_")))
    if not hasattr(builder, "get_bf16"):
        builder.get_bf16 = lambda self, value: _refuse("a scalar constant")
    reduction = interpreter.ReduceScanOpInterface
    reduction.apply = _guarded(reduction.apply, "a reduction or scan")

    run = interpreter.GridExecutor.__call__

    @functools.wraps(run)
    def unwrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, *args, **kwargs)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, Bfloat16ArithmeticError):
                cause = cause.__cause__
            raise cause or error from None

    interpreter.GridExecutor.__call__ = unwrapped


def _guarded(function: Callable, name: str) -> Callable:
    @functools.wraps(function)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        # np.where moves bits without computing on them.
        if not any(arg is np.where for arg in args):
            operands = [value for arg in args for value in (arg if isinstance(arg, tuple) else (arg,))]
            if any(_is_bfloat16(value) for value in operands):
                operation = getattr(next((a for a in args if callable(a)), None), "__name__", name)
                _refuse(operation)
        return function(self, *args, **kwargs)

    return checked


def _shuffle_programs(builder: Any) -> None:
    """Each launch has an order of its own, the same in every run of the process."""
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    launches = itertools.count()

    def set_grid_dim(self: Any, *dim: int) -> None:
        set_dim(self, *dim)
        programs = list(itertools.product(*map(range, dim)))
        random.Random(next(launches)).shuffle(programs)
        self.lrc_programs = iter(programs)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        set_idx(self, *next(self.lrc_programs))

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx


def _tune_without_driver(autotuner: Any) -> None:
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.configs[0]
        chosen = {**kwargs, **config.all_kwargs()}
        if config.pre_hook is not None:
            config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **chosen})
        return self.fn.run(*args, **chosen)

    autotuner.run = run

# SPDX-License-Identifier: Apache-2.0
"""The only place that picks an implementation: every op is one `torch.library` op with its backends beneath it.

In: a schema and one function per backend. Out: `torch.ops.lrc.<name>`, opaque to torch.compile, so that changing the
backend never breaks a graph.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lrc_kernels import env

ORDER = env.BACKENDS
_DEVICES = {**dict.fromkeys(("flash_attn", "aten", "cudnn", "cuda", "triton"), ("cuda",)), "cpu": ("cpu",)}

LIB = torch.library.Library("lrc", "DEF")
OPS: dict[str, Op] = {}

_forced: str | None = None
_records: list[list[tuple[str, str]]] = []
_warned: set[str] = set()


def _check_name(name: str | None, argument: str) -> None:
    if name is not None and name not in ORDER:
        raise ValueError(f"{argument} must be one of {', '.join(ORDER)} or None, got {name!r}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Force one backend for every op in this process, over `LRC_BACKEND`; None restores the automatic choice.

    A forced backend that cannot take a call raises RuntimeError and says why; it never falls through to another.

    Args:
        name: "cuda", "triton", "cpu", "reference", for attention also "flash_attn", "aten", "cudnn", or None.

    Raises:
        ValueError: an unknown name.
    """
    global _forced
    _check_name(name, "name")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


@contextlib.contextmanager
def record() -> Iterator[list[tuple[str, str]]]:
    """Collect (op name, backend) for each op that runs inside the context, in order, on any thread.

    >>> with record() as ran:
    ...     compress_clips(x, 64, 32)
    >>> ran
    [('tome_compress_fwd', 'cpu')]
    """
    ran: list[tuple[str, str]] = []
    _records.append(ran)
    try:
        yield ran
    finally:
        _records[:] = [other for other in _records if other is not ran]


def forced_backend() -> str | None:
    """The backend that `use_backend` or `LRC_BACKEND` forces, or None."""
    return _forced or env.backend()


def triton_unavailable(device: torch.device | None = None) -> str | None:
    """Why Triton kernels cannot run (on `device`, where one is given), or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install lrc-kernels[triton])"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device is None and not torch.cuda.is_available():
        return "no CUDA device (TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
    if device is not None and device.type != "cuda":
        return f"Triton needs CUDA tensors, got {device.type} (TRITON_INTERPRET=1 runs the kernels in its interpreter)"
    return None


class Implementation:
    """One backend of one op: `run` takes the op's arguments, `supports` and `available` give a reason or None."""

    def __init__(self, run: Callable, supports: Callable[..., str | None], available: Callable[[], str | None]):
        self.run, self.supports, self.available = run, supports, available


class Op:
    """One registered op.

    Args:
        schema: the `torch.library` schema, its name without the namespace.
        fake: shapes and dtypes of the outputs, for tracing.
        autocast: "keep" computes in the dtypes given (what decides a selection must not depend on autocast);
            a tuple of argument names casts these to the autocast dtype, as scaled_dot_product_attention does, save
            fp64 ones; the other arguments (a log-sum-exp, a bias) keep their precision.
    """

    def __init__(self, schema: str, fake: Callable, *, autocast: str | tuple[str, ...] = "keep"):
        self.name = schema.split("(")[0]
        self.implementations: dict[str, Implementation] = {}
        LIB.define(schema)
        arguments = getattr(torch.ops.lrc, self.name).default._schema.arguments
        cast = () if autocast == "keep" else autocast
        self._cast = [index for index, argument in enumerate(arguments) if argument.name in cast]
        self._mutated = [
            index for index, argument in enumerate(arguments) if argument.alias_info and argument.alias_info.is_write
        ]
        LIB.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lrc::{self.name}", fake, lib=LIB)
        for key, device_type in (("AutocastCPU", "cpu"), ("AutocastCUDA", "cuda")):
            LIB.impl(self.name, self._autocast_rule(device_type), key)
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return getattr(torch.ops.lrc, self.name)(*args)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """What policies of activation checkpointing name it by."""
        return getattr(torch.ops.lrc, self.name).default

    def implement(
        self,
        backend: str,
        run: Callable,
        *,
        supports: Callable[..., str | None] = lambda *args: None,
        available: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Add a backend. `supports(*args)` says why it declines a call, `available()` why it cannot run at all here."""
        _check_name(backend, "backend")
        self.implementations[backend] = Implementation(run, supports, available)

    def _autocast_rule(self, device_type: str) -> Callable:
        def run(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            with torch.amp.autocast(device_type, enabled=False):
                cast = list(args)
                for index in self._cast:
                    if cast[index].dtype != torch.float64:
                        cast[index] = cast[index].to(dtype)
                return self(*cast)

        return run

    def _run(self, *args: Any) -> Any:
        backend = self._choose(args)
        for ran in _records:
            ran.append((self.name, backend))
        result = self.implementations[backend].run(*args)
        for index in self._mutated:
            # Below autograd nothing counts writes, and a tensor saved for a backward must be known to have changed.
            if not args[index].is_inference():
                torch.autograd.graph.increment_version(args[index])
        return result

    def _choose(self, args: tuple) -> str:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        if (forced := forced_backend()) is not None:
            reason = self._reason(forced, args, device)
            if reason is not None:
                raise RuntimeError(
                    f"lrc::{self.name}: backend {forced!r} was forced but cannot take this call: {reason}"
                )
            return forced
        reasons: list[str] = []
        for backend in ORDER:
            if backend in self.implementations and device.type in _DEVICES.get(backend, (device.type,)):
                reason = self._reason(backend, args, device)
                if reason is None:
                    if backend == "reference" and device.type == "cuda":
                        self._warn_reference(reasons)
                    return backend
                reasons.append(f"{backend}: {reason}")
        raise RuntimeError(f"lrc::{self.name}: no backend takes this call: {'; '.join(reasons)}")

    def _reason(self, backend: str, args: tuple, device: torch.device) -> str | None:
        implementation = self.implementations.get(backend)
        if implementation is None:
            return f"{self.name} has no {backend} implementation, only {', '.join(self.implementations)}"
        if backend == "triton" and (reason := triton_unavailable(device)) is not None:
            return reason
        if backend not in ("triton", "reference") and device.type not in _DEVICES[backend]:
            return f"it needs {_DEVICES[backend][0]} tensors, got {device.type}"
        return implementation.available() or implementation.supports(*args)

    def _warn_reference(self, reasons: list[str]) -> None:
        if self.name not in _warned:
            _warned.add(self.name)
            warnings.warn(
                f"lrc::{self.name} runs on the PyTorch reference: {'; '.join(reasons) or 'no kernel'}", stacklevel=2
            )


def describe() -> dict[str, dict[str, str | None]]:
    """For each op and backend: None where it can run on this machine, else the reason why not."""
    table: dict[str, dict[str, str | None]] = {}
    for name, op in OPS.items():
        table[name] = {}
        for backend in ORDER:
            implementation = op.implementations.get(backend)
            if implementation is None:
                table[name][backend] = "not implemented"
            elif backend == "triton":
                table[name][backend] = triton_unavailable() or implementation.available()
            else:
                table[name][backend] = implementation.available()
    return table

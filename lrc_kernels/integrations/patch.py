# SPDX-License-Identifier: Apache-2.0
"""What an `apply_*` function returns: which forwards it replaced, and how to put them back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from torch import nn


class Patch:
    """A patched model. `undo()` restores it, at once or at the end of a `with` block.

    Attributes:
        model: what was given to the `apply_*` function, patched in place.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._undo: list[Callable[[], Any]] = []

    def undo(self) -> None:
        """Restore every module as it was. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def replace_forwards(self, replacements: Sequence[tuple[nn.Module, Callable[..., Any], Any]]) -> None:
        """For each (module, function, first): let module(...) be function(first, module, ...).

        What an earlier patch with `function` did is replaced. Where one module is refused, none is touched.

        Raises:
            ValueError: something else has replaced a module's forward already.
        """
        for module, function, _ in replacements:
            previous = module.__dict__.get("forward")
            if previous is not None and getattr(previous, "func", None) is not function:
                raise ValueError(
                    f"{type(module).__name__}.forward must be its own, got one that something else has replaced "
                    "(offloading by accelerate?): apply the patch first"
                )
        for module, function, first in replacements:
            # In the instance's own dictionary: it survives deepcopy and pickle, and type(module).forward stays as it
            # was.
            replacement = functools.partial(function, first, module)
            module.__dict__["forward"] = replacement
            module.__dict__["_replicate_for_data_parallel"] = functools.partial(_replicate, module)
            self._undo.append(functools.partial(_restore, module, replacement))

    def replace_pre_hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Let `hook`(module, arguments, options) see every call of the module first; an earlier patch's is replaced."""
        for key in [key for key, earlier in module._forward_pre_hooks.items() if earlier is hook]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def at_undo(self, function: Callable[[], Any]) -> None:
        """Also call `function` when the patch is undone."""
        self._undo.append(function)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


def _restore(module: nn.Module, replacement: Any) -> None:
    # A later patch of the same module is not this one's to undo.
    if module.__dict__.get("forward") is replacement:
        del module.__dict__["forward"], module.__dict__["_replicate_for_data_parallel"]


def _replicate(module: nn.Module) -> nn.Module:
    """What DataParallel makes of a module for each of its devices: the copied forward would run the original there."""
    replica = type(module)._replicate_for_data_parallel(module)
    forward: Any = module.forward
    replica.__dict__["forward"] = functools.partial(forward.func, forward.args[0], replica)
    return replica

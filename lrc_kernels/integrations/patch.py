# SPDX-License-Identifier: Apache-2.0
"""What an `apply_*` function returns: which forwards it replaced, and how to put them back."""

from __future__ import annotations

import functools
from collections.abc import Callable
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

    def replace_forward(self, module: nn.Module, function: Callable[..., Any], *arguments: Any) -> None:
        """Let module(...) be function(*arguments, module, ...). What an earlier patch with `function` did is replaced.

        Raises:
            ValueError: something else has replaced the module's forward already.
        """
        # In the instance's own dictionary: it survives deepcopy and pickle, and type(module).forward stays what it was.
        previous = module.__dict__.get("forward")
        if previous is not None and getattr(previous, "func", None) is not function:
            raise ValueError(
                f"{type(module).__name__}.forward must be its own, got one that something else has replaced "
                "(offloading by accelerate?): apply the patch first"
            )
        replacement = functools.partial(function, *arguments, module)
        module.__dict__["forward"] = replacement
        self._undo.append(lambda: _restore(module, replacement))

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
        del module.__dict__["forward"]

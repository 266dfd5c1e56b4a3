# SPDX-License-Identifier: Apache-2.0
"""Where a loader stands: a small dictionary for a checkpoint, out of counters and bad samples, and back."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lrc_kernels.packing.dataset import PackedDataset

SCHEMA = 1


class StateMismatchError(ValueError):
    """A state of another data set, plan or position."""


@dataclass(frozen=True)
class LoaderState:
    """What resuming needs; the plan is computed anew.

    Args:
        index_digest, config_digest, seed, packs_per_step: what the plan came from.
        epoch: of the plan.
        step: steps delivered whole.
        packs: packs that each rank has delivered of the step after them.
        dp_size: ranks that shared that step.
        bad: sample_ids that could not be decoded.
    """

    index_digest: str
    config_digest: str
    seed: int
    packs_per_step: int
    epoch: int
    step: int
    packs: int
    dp_size: int
    bad: tuple[int, ...]

    @classmethod
    def of(cls, dataset: PackedDataset, step: int, packs: int, dp_size: int, bad: Iterable[int]) -> LoaderState:
        plan = dataset.plan
        return cls(
            dataset.index.digest,
            config_digest(dataset),
            plan.seed,
            plan.packs_per_step,
            plan.epoch,
            step,
            packs,
            dp_size,
            tuple(sorted(bad)),
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, below 1 KB + 8 bytes per bad sample."""
        numbers = np.array(self.bad, dtype="<u4").tobytes()
        return {"schema": SCHEMA, **asdict(self), "bad": base64.b64encode(numbers).decode()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> LoaderState:
        """The state back.

        Raises:
            TypeError, StateMismatchError: what is no such state.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a dict of state_dict(), got {type(state).__name__}")
        if state.get("schema") != SCHEMA:
            raise StateMismatchError(f"state must have schema {SCHEMA}, got {state.get('schema')!r}")
        values: dict[str, Any] = {}
        for name, kind in cls.__annotations__.items():
            if name not in state:
                raise StateMismatchError(f"state must hold {name!r}, got {sorted(state)}")
            value = state[name]
            if kind == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise StateMismatchError(f"state[{name!r}] must be an int >= 0, got {value!r}")
            if kind != "int" and not isinstance(value, str):
                raise StateMismatchError(f"state[{name!r}] must be a str, got {value!r}")
            values[name] = value
        try:
            bad = np.frombuffer(base64.b64decode(values["bad"], validate=True), dtype="<u4")
        except ValueError:
            raise StateMismatchError("state['bad'] must be base64 of 32-bit numbers") from None
        return cls(**{**values, "bad": tuple(bad.tolist())})


def merge_states(states: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """One state of those of all ranks: the position, which they share, and every bad sample that any of them met.

    Raises:
        ValueError: no state. StateMismatchError: ranks that stand in different places.
    """
    parsed = [LoaderState.from_dict(state) for state in states]
    if not parsed:
        raise ValueError("states must hold at least one state, got none")
    for rank, state in enumerate(parsed):
        for name, value in asdict(parsed[0]).items():
            if name != "bad" and getattr(state, name) != value:
                raise StateMismatchError(f"states[{rank}] has {name} {getattr(state, name)!r}, states[0] {value!r}")
    bad = tuple(sorted({sample_id for state in parsed for sample_id in state.bad}))
    return LoaderState(**{**asdict(parsed[0]), "bad": bad}).as_dict()


def config_digest(dataset: PackedDataset) -> str:
    """Names what decides the packs beside the index, and what decides pixels and weights."""
    config = {
        "pack": asdict(dataset.plan.config),
        "balance": dataset.plan.balance,
        "sampling": asdict(dataset.sampling),
        "image_size": dataset.image_size,
        "loss": dataset.loss,
    }
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

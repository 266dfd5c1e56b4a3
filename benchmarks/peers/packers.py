# SPDX-License-Identifier: Apache-2.0
"""The packers of other training libraries, their own code, where they are installed: lengths in the order of arrival
and the tokens of a pack in, packs as lists of positions out. `peers/packing.py` restates those that are not.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np

Packs = list[list[int]]
Packer = Callable[[list[int], int], Packs]

_MAP_BATCH = 1000
_AXOLOTL_GROUP, _AXOLOTL_BIN = 100_000, 200


def installed() -> dict[str, Packer]:
    """Name of the restated peer -> the original of it; ms-swift packs with the package binpacking."""
    found: dict[str, Packer] = {}
    for name, load in (
        ("trl_bfd", _trl),
        ("llamafactory_knapsack", _llamafactory),
        ("axolotl_first_fit", _axolotl),
        ("ms_swift_binpacking", _binpacking),
    ):
        try:
            found[name] = load()
        except (ImportError, OSError, RuntimeError):
            continue
    return found


def _in_batches(pack: Callable[[list[int], int], Packs]) -> Packer:
    """Positions within batches of 1,000, the preprocessing batch of `datasets`, to positions among all."""

    def packs_of(lengths: list[int], capacity: int) -> Packs:
        return [
            [first + position for position in members]
            for first in range(0, len(lengths), _MAP_BATCH)
            for members in pack(lengths[first : first + _MAP_BATCH], capacity)
        ]

    return packs_of


def _trl() -> Packer:
    import pyarrow
    from datasets import Dataset, disable_progress_bars
    from datasets.table import InMemoryTable
    from trl import pack_dataset

    disable_progress_bars()

    def pack(lengths: list[int], capacity: int) -> Packs:
        # Each sample's tokens are its position, so that the packs say whose they are.
        tokens = pyarrow.array(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))
        rows = pyarrow.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), tokens)
        samples = Dataset(InMemoryTable(pyarrow.table({"input_ids": rows})), fingerprint="samples")
        packed = pack_dataset(samples, capacity, strategy="bfd")
        table = packed.with_format("arrow")[:]
        packs = []
        for ids, members in zip(table["input_ids"], table["seq_lengths"], strict=True):
            starts = np.concatenate([[0], np.cumsum(members.values.to_numpy())[:-1]])
            packs.append(ids.values.to_numpy()[starts].tolist())
        return packs

    return _in_batches(pack)


def _llamafactory() -> Packer:
    # The package imports every model's processor; this file of it needs none.
    package = find_spec("llamafactory")
    if package is None or not package.submodule_search_locations:
        raise ImportError("llamafactory is not installed")
    path = Path(package.submodule_search_locations[0], "data", "processor", "processor_utils.py")
    spec = spec_from_file_location("llamafactory_processor_utils", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)

    def pack(lengths: list[int], capacity: int) -> Packs:
        positions = defaultdict(list)
        for position, length in enumerate(lengths):
            positions[length].append(position)
        return [
            [positions[length].pop() for length in members] for members in module.greedy_knapsack([*lengths], capacity)
        ]

    return _in_batches(pack)


def _axolotl() -> Packer:
    from axolotl.utils.samplers.multipack import pack_parallel

    def pack(lengths: list[int], capacity: int) -> Packs:
        packs = pack_parallel(np.array(lengths), capacity, _AXOLOTL_GROUP, _AXOLOTL_BIN, num_processes=1)
        return [list(map(int, members)) for members in packs]

    return pack


def _binpacking() -> Packer:
    from binpacking import to_constant_volume

    def pack(lengths: list[int], capacity: int) -> Packs:
        packs = to_constant_volume(list(enumerate(lengths)), capacity, weight_pos=1)
        return [[position for position, _ in members] for members in packs]

    return _in_batches(pack)

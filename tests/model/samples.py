# SPDX-License-Identifier: Apache-2.0
"""Samples of random frames and words for models of the size `tiny`."""

from __future__ import annotations

import torch

from lrc_kernels.packing import Sample


def make_sample(num_frames: int, sample_id: int, length: int = 14, labelled: bool = True) -> Sample:
    """A prompt of `length` words with one visual token per frame behind the second word, and an answer at its end."""
    random = torch.Generator().manual_seed(sample_id)
    n = length + num_frames
    visual = torch.zeros(n, dtype=torch.bool)
    visual[2 : 2 + num_frames] = True
    labels = torch.full((n,), -100)
    labels[-4:] = torch.randint(0, 250, (4,), generator=random)
    frames = torch.randint(0, 256, (num_frames, 3, 56, 56), generator=random).to(torch.uint8)
    return Sample(
        input_ids=torch.randint(0, 250, (n,), generator=random),
        visual=visual,
        frames=frames if num_frames else None,
        labels=labels if labelled else None,
        sample_id=sample_id,
    )

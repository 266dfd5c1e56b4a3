# SPDX-License-Identifier: Apache-2.0
"""From video files to batches: which moments to look at, the frames shown at them, which samples share a pack, and
packs of tensors ready for the model."""

from lrc_kernels.packing.batch import PackedBatch, Sample, pack_samples
from lrc_kernels.packing.build import build_index
from lrc_kernels.packing.config import CostModel, PackConfig
from lrc_kernels.packing.dataset import BadSample, PackedDataset
from lrc_kernels.packing.index import Index, IndexStaleError
from lrc_kernels.packing.loader import (
    BadSampleError,
    LoaderStats,
    PackedLoader,
    ParallelRank,
    TooManyBadSamples,
)
from lrc_kernels.packing.media import MediaSlice
from lrc_kernels.packing.plan import OverlongSampleError, PackPlan, PackStats, plan_packs
from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.state import StateMismatchError, merge_states
from lrc_kernels.packing.template import ChatTemplate, MediaTokenMismatch, Tokenizer
from lrc_kernels.packing.video import DecodedVideo, VideoInfo, decode_frames, probe_video, video_activity

__all__ = [
    "BadSample",
    "BadSampleError",
    "ChatTemplate",
    "CostModel",
    "DecodedVideo",
    "Index",
    "IndexStaleError",
    "LoaderStats",
    "MediaSlice",
    "MediaTokenMismatch",
    "OverlongSampleError",
    "PackConfig",
    "PackPlan",
    "PackStats",
    "PackedBatch",
    "PackedDataset",
    "PackedLoader",
    "ParallelRank",
    "Sample",
    "StateMismatchError",
    "TemporalSampling",
    "Tokenizer",
    "TooManyBadSamples",
    "VideoInfo",
    "build_index",
    "decode_frames",
    "merge_states",
    "pack_samples",
    "plan_packs",
    "probe_video",
    "video_activity",
]

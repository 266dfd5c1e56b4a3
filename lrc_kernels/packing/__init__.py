# SPDX-License-Identifier: Apache-2.0
"""From video files to batches: which moments to look at, the frames shown at them, and packs of whole samples."""

from lrc_kernels.packing.batch import PackedBatch, Sample, pack_samples
from lrc_kernels.packing.media import MediaSlice
from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.video import DecodedVideo, VideoInfo, decode_frames, probe_video, video_activity

__all__ = [
    "DecodedVideo",
    "MediaSlice",
    "PackedBatch",
    "Sample",
    "TemporalSampling",
    "VideoInfo",
    "decode_frames",
    "pack_samples",
    "probe_video",
    "video_activity",
]

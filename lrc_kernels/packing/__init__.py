# SPDX-License-Identifier: Apache-2.0
"""From video files to batches: which moments to look at, and the frames shown at them."""

from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.video import DecodedVideo, VideoInfo, decode_frames, probe_video

__all__ = ["DecodedVideo", "TemporalSampling", "VideoInfo", "decode_frames", "probe_video"]

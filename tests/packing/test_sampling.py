# SPDX-License-Identifier: Apache-2.0
"""The sampling rule against the figures of the paper and of the released code."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrc_kernels.packing import TemporalSampling

DURATIONS = st.floats(1e-3, 20_000.0)


@pytest.mark.parametrize(
    ("duration_s", "paper", "release"),
    [
        (0.04, 64, 64),
        (4.3, 64, 64),
        (6.5, 96, 64),
        (10.0, 144, 64),
        (34.0, 504, 64),
        (59.99, 512, 64),
        (60.0, 64, 64),
        (71.9, 64, 64),
        (79.9, 72, 72),
        (80.0, 80, 80),
        (519.0, 512, 512),
        (3600.0, 512, 512),
    ],
)
def test_presets_count_whole_clips(duration_s: float, paper: int, release: int) -> None:
    assert TemporalSampling.paper().num_frames(duration_s) == paper
    assert TemporalSampling.release().num_frames(duration_s) == release


def test_cliff_and_smooth_differ_only_past_the_border() -> None:
    cliff, smooth = TemporalSampling(policy="cliff"), TemporalSampling(policy="smooth")
    assert (cliff.num_frames(59), cliff.num_frames(61)) == (512, 64)
    assert (smooth.num_frames(59), smooth.num_frames(61)) == (512, 512)
    for duration_s in np.linspace(0.1, 59.9, 300).tolist():
        assert smooth.num_frames(duration_s) == cliff.num_frames(duration_s)


@given(DURATIONS, DURATIONS)
def test_smooth_never_falls(a: float, b: float) -> None:
    smooth = TemporalSampling(dense_fps=4.0, max_frames=1024, policy="smooth")
    assert smooth.num_frames(min(a, b)) <= smooth.num_frames(max(a, b))


def test_smooth_holds_the_dense_count_until_the_sparse_rate_asks_for_more() -> None:
    smooth = TemporalSampling(dense_fps=4.0, max_frames=1024, policy="smooth")
    assert [smooth.num_frames(d) for d in (59.99, 60.0, 120.0, 240.0, 247.9, 248.0, 5000.0)] == [
        232,
        240,
        240,
        240,
        240,
        248,
        1024,
    ]


@given(DURATIONS, st.sampled_from(["cliff", "smooth"]), st.sampled_from([1, 4, 8]))
def test_counts_are_whole_clips_within_the_bounds(duration_s: float, policy: str, clip: int) -> None:
    sampling = TemporalSampling(policy=policy, multiple_of=clip)
    frames = sampling.num_frames(duration_s)
    assert 64 <= frames <= 512
    assert frames % clip == 0


@given(DURATIONS, st.integers(1, 700))
def test_timestamps_are_the_middles_of_equal_intervals(duration_s: float, n: int) -> None:
    times = TemporalSampling().timestamps(duration_s, n)
    assert times.dtype == np.float64
    assert times.shape == (n,)
    assert times[0] > 0
    assert times[-1] < duration_s
    edges = np.linspace(0, duration_s, n + 1)
    np.testing.assert_allclose(times, (edges[:-1] + edges[1:]) / 2, rtol=1e-12)


@pytest.mark.parametrize(
    ("argument", "value", "error", "match"),
    [
        ("dense_fps", 0.0, ValueError, "dense_fps must be finite and above 0, got 0.0"),
        ("sparse_fps", math.nan, ValueError, "sparse_fps must be finite and above 0, got nan"),
        ("sparse_fps", 16.0, ValueError, "sparse_fps must be at most dense_fps = 15.0, got 16.0"),
        ("short_max_s", math.inf, ValueError, "short_max_s must be finite and above 0, got inf"),
        ("short_max_s", "60", TypeError, "short_max_s must be a number, got str"),
        ("min_frames", 0, ValueError, "min_frames must be >= 8, got 0"),
        ("min_frames", 65, ValueError, "min_frames must be a multiple of multiple_of = 8, got 65"),
        ("max_frames", 56, ValueError, "max_frames must be at least min_frames = 64, got 56"),
        ("max_frames", 512.0, TypeError, "max_frames must be an int, got float"),
        ("multiple_of", 0, ValueError, "multiple_of must be >= 1, got 0"),
        ("policy", "step", ValueError, "policy must be one of cliff, smooth, got 'step'"),
        ("content", "bytes", ValueError, "content must be one of packets, got 'bytes'"),
        ("content", [1.0, -2.0], ValueError, "content must be finite and >= 0, got -2.0 at second 1"),
        ("content", [[1.0]], ValueError, r"content must have one number per second, got shape \[1, 1\]"),
        ("snap", "nearest", ValueError, "snap must be one of exact, keyframe, got 'nearest'"),
        ("snap_tolerance", 1.5, ValueError, r"snap_tolerance must be in \(0, 1\], got 1.5"),
    ],
)
def test_bad_rules_are_refused(argument: str, value: object, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        TemporalSampling(**{argument: value})


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0.01, 1.0), st.integers(1, 300))
def test_content_moves_times_but_never_their_number(activity: list[float], last: float, n: int) -> None:
    duration_s = len(activity) - 1 + last
    times = TemporalSampling(content=activity).timestamps(duration_s, n)
    assert times.shape == (n,) and times[0] > 0 and times[-1] < duration_s
    gaps = np.diff(times)
    assert (gaps > 0).all() and (gaps <= 2 * duration_s / n * (1 + 1e-9)).all()


def test_content_draws_times_to_where_something_happens() -> None:
    busy = TemporalSampling().with_content([0.0] * 5 + [1.0] + [0.0] * 4)
    times = busy.timestamps(10.0, 100)
    # Half of the frames are spread evenly, so the busy second has a twentieth of those and all of the others.
    assert ((times >= 5) & (times < 6)).sum() == 55
    still = TemporalSampling(content=[0.0] * 10).timestamps(10.0, 100)
    np.testing.assert_array_equal(still, TemporalSampling().timestamps(10.0, 100))
    with pytest.raises(ValueError, match=r"content must have one number per begun second \(9\), got 10"):
        busy.timestamps(8.5, 4)
    with pytest.raises(ValueError, match="content must be the activity of each second here"):
        TemporalSampling(content="packets").timestamps(8.5, 4)


def test_tolerance_is_a_share_of_the_spacing() -> None:
    assert TemporalSampling(snap="keyframe", snap_tolerance=0.25).tolerance_s(100.0, 50) == 0.5
    assert TemporalSampling().tolerance_s(100.0, 50) == 0.0


@pytest.mark.parametrize("duration_s", [0.0, -1.0, math.nan, math.inf])
def test_bad_durations_are_refused(duration_s: float) -> None:
    with pytest.raises(ValueError, match="duration_s must be finite and above 0, got"):
        TemporalSampling().num_frames(duration_s)
    with pytest.raises(ValueError, match="duration_s must be finite and above 0, got"):
        TemporalSampling().timestamps(duration_s, 8)


def test_bad_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        TemporalSampling().timestamps(10.0, 0)
    with pytest.raises(TypeError, match="n must be an int, got float"):
        TemporalSampling().timestamps(10.0, 8.0)  # type: ignore[arg-type]


def test_rules_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TemporalSampling().dense_fps = 1.0  # type: ignore[misc]

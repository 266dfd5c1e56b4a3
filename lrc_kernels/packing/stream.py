# SPDX-License-Identifier: Apache-2.0
"""One video stream of a file, through PyAV: times in, the frames shown at them out, or None where they are damaged.

The packets of a file say which frames there should be. Against them each decoded frame is checked, since decoders
conceal damage: they repeat or invent pictures and report nothing. Flipped bits that still decode stay unnoticed, as in
every player: video codecs carry no checksum of their pictures.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from lrc_kernels.packing.media import MAX_PIXELS, MAX_SECONDS, MediaSlice

if TYPE_CHECKING:
    import av

# Demuxers whose index lists keyframes from the file's own tables; others guess it while they read.
INDEXED_FORMATS = ("mov", "mp4", "matroska", "webm", "avi")
# All others are refused unread: playlists open what they name, and FFmpeg takes text for the drawing commands of a
# terminal.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,asf,ogg,gif,mxf,nut,h264,hevc,m4v,"
    "obu,av1,ivf,rm,dv,wav"
)


@dataclass(frozen=True)
class Picture:
    """A decoded frame, the tick of its stream's clock and the second from the stream's start at which it is shown."""

    frame: av.VideoFrame
    tick: int
    time_s: float
    intact: bool


@contextmanager
def open_stream(path: Path | MediaSlice, threads: int = 0) -> Iterator[VideoStream]:
    """The first video stream of a file, closed at the end of the block.

    Raises:
        ImportError: PyAV is not installed. FileNotFoundError: no such file. ValueError: unreadable, or without video.
    """
    stream = VideoStream(path, threads)
    try:
        yield stream
    finally:
        stream.close()


class VideoStream:
    """Frames by time; forward in time is cheap, backward costs a `restart`."""

    _container: av.container.InputContainer
    _stream: av.VideoStream
    _time_base: Fraction
    _packets: Iterator[av.Packet[av.VideoStream]]
    _ready: deque[Picture]
    _current: Picture | None

    def __init__(self, path: Path | MediaSlice, threads: int = 0) -> None:
        try:
            import av
        except ImportError as error:
            raise ImportError(f'decoding {path} needs PyAV: pip install "lrc-kernels[video]" ({error})') from error
        file = path.path if isinstance(path, MediaSlice) else path
        if not file.exists():
            raise FileNotFoundError(f"no such video file: {path}")
        self.path = path
        self._url = path.url if isinstance(path, MediaSlice) else f"file:{path}"
        self._error: type[Exception] = av.FFmpegError
        self._open = av.open
        self._attached = av.stream.Disposition.attached_pic
        self._threads = threads
        self._delay = self._interval = 0
        self._last_keyframe: tuple[int, Picture | None] | None = None
        self.restart()
        try:
            rate = self._stream.average_rate or self._stream.guessed_rate
            self._interval = round(1 / (rate * self._time_base)) if rate else 0
            self._start = self._stream.start_time or 0
            self._keyframes, self._last_indexed = self._read_index()
            self.duration_s = self._duration()
        except self._error as error:
            self.close()
            raise ValueError(f"cannot read {path}: {error}") from error
        except ValueError:
            self.close()
            raise

    @property
    def fps(self) -> float | None:
        rate = self._stream.average_rate or self._stream.guessed_rate
        return float(rate) if rate else None

    @property
    def num_frames(self) -> int | None:
        return self._stream.frames or None

    @property
    def codec(self) -> str:
        return self._stream.codec_context.name

    @property
    def index(self) -> int:
        """The stream's number among all streams of the file."""
        return self._stream.index

    @property
    def is_indexed(self) -> bool:
        """Whether the file lists its keyframes."""
        return any(name in INDEXED_FORMATS for name in self._container.format.name.split(","))

    def seconds_within_tick(self, time_s: float) -> float:
        """The stream's own second in the middle of the tick that a time from its start falls into."""
        return (2 * self._tick(time_s) + 1) * self._time_base.numerator / (2 * self._time_base.denominator)

    def time_of(self, stream_s: float) -> float:
        """Seconds from the stream's start at which the tick begins that the stream's own second is rounded to."""
        return self._seconds(round(stream_s * self._time_base.denominator / self._time_base.numerator))

    def close(self) -> None:
        self._container.close()

    def restart(self) -> None:
        """Back to the first packet, by opening the file anew: MPEG-TS loses frames when it seeks to its start."""
        if hasattr(self, "_container"):
            self._container.close()
        try:
            options = {"format_whitelist": FORMATS, "protocol_whitelist": "file,subfile"}
            self._container = self._open(self._url, metadata_errors="ignore", options=options)
        except self._error as error:
            raise ValueError(f"cannot read {self.path} as a video: {error}") from error
        streams = [s for s in self._container.streams.video if s.codec_context and not s.disposition & self._attached]
        if not streams:
            self._container.close()
            raise ValueError(f"{self.path} holds no video stream")
        self._stream = streams[0]
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > MAX_PIXELS:
            self._container.close()
            raise ValueError(
                f"{self.path} claims frames of {width} x {height} pixels, more than {MAX_PIXELS} are refused"
            )
        self._time_base = self._stream.time_base or Fraction(1, 1)
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = self._threads
        # Without it, decoders fill damaged areas in from other frames and call the result a frame.
        self._stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
        self._forget()

    def first_frame(self) -> av.VideoFrame:
        """The first frame that can be decoded, of a stream not yet read from. ValueError where none can."""
        picture = self._peek()
        if picture is None:
            raise ValueError(f"no frame of {self.path} can be decoded")
        return picture.frame

    def picture_at(self, time_s: float) -> Picture | None:
        """The last frame with pts <= time_s, None where the file is damaged; time_s must not fall between calls."""
        tick = self._tick(time_s)
        self._seek_towards(tick)
        while (following := self._peek()) is not None and following.tick <= tick:
            self._current = self._ready.popleft()
        due = bisect.bisect_right(self._due, tick)
        del self._due[: max(0, due - 1)]
        shown = self._current
        if shown is None and not due:
            # Streams may begin a rounding error after their start_time.
            shown = following
        if shown is None or not shown.intact or (due and shown.tick < self._due[0]):
            return None
        return None if following is None and self._is_cut_off_before(tick) else shown

    def keyframe_near(self, time_s: float, tolerance_s: float) -> Picture | None:
        """The keyframe shown closest to `time_s`, None where none lies within the tolerance or it is damaged.

        Needs `restart` before `picture_at` is called again. Files without an index of keyframes have none.
        """
        tick = self._tick(time_s)
        at = bisect.bisect_left(self._keyframes, tick - self._delay)
        # What the index says of display times is right to the delay of reordering.
        reach = self._delay + tolerance_s / self._time_base
        near = [k for k in self._keyframes[max(0, at - 1) : at + 1] if abs(k + self._delay - tick) <= reach]
        for keyframe in sorted(near, key=lambda keyframe: abs(keyframe + self._delay - tick)):
            picture = self._keyframe(keyframe)
            if picture is not None and abs(picture.time_s - time_s) <= tolerance_s:
                return picture
        return None

    def activity(self) -> list[float]:
        """Bytes of the packets in each second, keyframes left out: what the encoder found to have changed."""
        seconds = [0.0] * math.ceil(self.duration_s)
        for packet in self._container.demux(self._stream):
            if packet.pts is not None and not packet.is_keyframe:
                second = math.floor((packet.pts - self._start) * self._time_base)
                seconds[min(max(second, 0), len(seconds) - 1)] += packet.size
        self.restart()
        return seconds

    def _tick(self, time_s: float) -> int:
        # Ticks that were written as seconds come back a rounding error too low.
        ticks = time_s * self._time_base.denominator / self._time_base.numerator
        return self._start + math.floor(ticks + 1e-3)

    def _seconds(self, tick: int) -> float:
        # Division of integers rounds as the fraction would, in a tenth of its time.
        return (tick - self._start) * self._time_base.numerator / self._time_base.denominator

    def _keyframe(self, keyframe: int) -> Picture | None:
        # Neighbouring times often ask for the same one.
        if self._last_keyframe is None or self._last_keyframe[0] != keyframe:
            try:
                # Indices hold decoding times, seeks go by display times.
                self._container.seek(keyframe + self._delay, stream=self._stream)
            except self._error:
                return None
            self._forget()
            self._feed()
            self._decode(None)
            whole = (p for p in self._ready if p.intact and p.frame.key_frame)
            self._last_keyframe = keyframe, next(whole, None)
        return self._last_keyframe[1]

    def _forget(self) -> None:
        self._packets = iter(self._container.demux(self._stream))
        self._ready = deque()
        self._current = None
        self._due: list[int] = []
        self._first_tick: int | None = None
        self._last_dts: int | None = None
        self._end = 0
        self._broken_at: int | None = None
        self._ended = False

    def _seek_towards(self, tick: int) -> None:
        # The index holds decoding times, which are earlier than display times by the delay of reordering.
        k = bisect.bisect_right(self._keyframes, tick - self._delay) - 1
        if k < 0 or (self._last_dts is not None and self._keyframes[k] <= self._last_dts):
            return
        if self._last_dts is None and k == 0:
            return
        for keyframe in reversed(self._keyframes[: k + 1]):
            try:
                self._container.seek(keyframe, stream=self._stream)
            except self._error:
                continue
            self._forget()
            self._feed()
            if self._first_tick is not None and self._first_tick <= tick:
                return
        self.restart()

    def _peek(self) -> Picture | None:
        while not self._ready and not self._ended:
            self._feed()
        return self._ready[0] if self._ready else None

    def _feed(self) -> None:
        """Demux and decode one packet."""
        try:
            packet = next(self._packets)
        except (StopIteration, self._error):
            self._ended = True
            self._decode(None)
            return
        if packet.size == 0:
            return
        if packet.dts is not None:
            self._last_dts = packet.dts if self._last_dts is None else max(self._last_dts, packet.dts)
        if packet.pts is not None:
            if self._first_tick is None:
                self._first_tick = packet.pts
            if packet.dts is not None:
                self._delay = max(self._delay, packet.pts - packet.dts)
            self._end = max(self._end, packet.pts + (packet.duration or self._interval))
            if not packet.is_discard:
                bisect.insort(self._due, packet.pts)
        if packet.is_corrupt:
            self._mark_broken(packet.pts)
        else:
            self._decode(packet)

    def _decode(self, packet: av.Packet | None) -> None:
        try:
            frames = self._stream.codec_context.decode(packet)
        except self._error:
            if packet is not None:
                self._mark_broken(packet.pts)
            return
        for frame in frames:
            if frame.pts is None:
                continue
            # All frames after a broken one may be built on it, up to the next keyframe.
            if self._broken_at is not None and frame.key_frame and frame.pts > self._broken_at:
                self._broken_at = None
            intact = self._broken_at is None and not frame.is_corrupt
            self._ready.append(Picture(frame, frame.pts, self._seconds(frame.pts), intact))

    def _mark_broken(self, tick: int | None) -> None:
        tick = self._end if tick is None else tick
        self._broken_at = tick if self._broken_at is None else max(self._broken_at, tick)

    def _is_cut_off_before(self, tick: int) -> bool:
        """Whether the packets end too early for the last of them to be shown at `tick`."""
        if self._last_indexed is not None and self._last_dts is not None and self._last_dts >= self._last_indexed:
            return False
        # Matroska rounds times to milliseconds and its packets' durations with them.
        return tick >= self._end + min(2, self._interval // 2)

    def _read_index(self) -> tuple[list[int], int | None]:
        """Decoding ticks of the keyframes, and of the last packet where the index lists every packet."""
        if not self.is_indexed:
            return [], None
        waits = "matroska" in self._container.format.name
        if waits:
            # Matroska reads its index at the first seek.
            self._container.seek(self._start, stream=self._stream)
        entries = [(entry.timestamp, entry.is_keyframe) for entry in self._stream.index_entries]
        if waits:
            self.restart()
        last = max(tick for tick, _ in entries) if entries and len(entries) == self._stream.frames else None
        return sorted(tick for tick, is_keyframe in entries if is_keyframe), last

    def _duration(self) -> float:
        """Seconds of the video stream; the file's own duration would count longer audio too."""
        if self._stream.duration:
            duration = float(self._stream.duration * self._time_base)
        elif tag := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d*)?)", self._stream.metadata.get("DURATION", "")):
            duration = 3600 * float(tag[1]) + 60 * float(tag[2]) + float(tag[3])
        else:
            duration = self._measured_duration()
        if not (math.isfinite(duration) and duration > 0):
            raise ValueError(f"the video stream of {self.path} has no duration, got {duration} s")
        if duration > MAX_SECONDS:
            raise ValueError(f"{self.path} claims to last {duration:g} s, more than {MAX_SECONDS} are refused")
        return duration

    def _measured_duration(self) -> float:
        if self._keyframes:
            self._container.seek(self._keyframes[-1], stream=self._stream)
        end = self._start
        for packet in self._container.demux(self._stream):
            if packet.pts is not None:
                end = max(end, packet.pts + (packet.duration or self._interval))
        self.restart()
        return float((end - self._start) * self._time_base)

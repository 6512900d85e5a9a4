"""Frames of films: those that decoding everything finds, found without decoding everything."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_mm.errors import DataError
from megatron_mm.ingest import frames
from megatron_mm.ingest.frames import all_frames_at, frames_at

CODECS = {
    "h264.mp4": ("libx264", {"preset": "veryfast", "bf": "3", "g": "40"}),
    "short.mkv": ("libx264", {"preset": "veryfast", "bf": "2", "g": "5"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2"}),
    "mpeg2.ts": ("mpeg2video", {"bf": "2", "g": "12"}),
    "motion_jpeg.mov": ("mjpeg", {}),
    "hevc.mp4": ("libx265", {"x265-params": "log-level=none"}),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
}


@pytest.fixture(params=CODECS)
def film(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Four and a half seconds at 12 frames a second of squares that move."""
    return make_film(tmp_path / request.param, *CODECS[request.param])


def make_film(path: Path, codec: str, options: dict[str, str], *, times: Sequence[int] = range(54)) -> Path:
    rng = np.random.default_rng(0)
    wall = np.kron(rng.integers(0, 255, (30, 40, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=12, options=options)
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for time in times:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(wall[time : time + 96, 2 * time : 2 * time + 128]))
            frame.pts, frame.time_base = time, Fraction(1, 12)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shown(found: frames.Shown) -> list[tuple[int, bytes]]:
    return [(tick, frame.to_ndarray(format="rgb24").tobytes()) for tick, frame in found]


@pytest.mark.parametrize("rate", [1, 5])
def test_frames_are_those_of_a_decoder_of_everything(film: Path, rate: int) -> None:
    expected = shown(all_frames_at(film, rate))
    assert [tick for tick, _ in expected] == list(range(-(-54 * rate // 12)))
    assert shown(frames_at(film, rate)) == expected


def test_what_is_skipped_is_not_decoded(tmp_path: Path) -> None:
    for name in ("h264.mp4", "mpeg2.ts", "motion_jpeg.mov"):
        path = make_film(tmp_path / name, *CODECS[name])
        assert shown(frames._needed(path, 1)) == shown(all_frames_at(path, 1)), "no film needs all of its frames"
    with pytest.raises(frames._NotAsPromised):
        list(frames._needed(make_film(tmp_path / "hevc.mp4", *CODECS["hevc.mp4"]), 1))


def test_seconds_without_a_frame_are_passed_over_alike(tmp_path: Path) -> None:
    times = [0, 1, 2, 14, 15, 40, 41, 42, 43, 44, 53]
    path = make_film(tmp_path / "gaps.mkv", *CODECS["short.mkv"], times=times)
    assert [tick for tick, _ in frames_at(path, 1)] == [0, 1, 3, 4]
    assert shown(frames_at(path, 1)) == shown(all_frames_at(path, 1))


@pytest.mark.parametrize("wrong", [(0, -7), (2, 7), (9, 10**9)])
def test_a_container_that_promises_other_frames_is_not_trusted(
    tmp_path: Path, wrong: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_film(tmp_path / "h264.mp4", *CODECS["h264.mp4"])
    right = frames._promised(path, 1)
    promised = [*right[: wrong[0]], wrong, *right[wrong[0] + 1 :]]
    monkeypatch.setattr(frames, "_promised", lambda path, rate: promised)
    assert shown(frames_at(path, 1)) == shown(all_frames_at(path, 1))


def test_damage_is_met_where_a_decoder_of_everything_meets_it(tmp_path: Path) -> None:
    path = make_film(tmp_path / "short.mkv", *CODECS["short.mkv"])
    data = bytearray(path.read_bytes())
    for start in range(len(data) // 2, len(data), 200):
        data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    found: list[list[tuple[int, bytes]]] = []
    for read in (all_frames_at, frames_at):
        found.append([])
        try:
            for one in read(path, 1):
                found[-1] += shown(iter([one]))
        except (av.error.FFmpegError, ValueError):
            pass
    assert [tick for tick, _ in found[1]] >= [tick for tick, _ in found[0]]
    assert found[1][:2] == found[0][:2], "what is before the damage"


def test_what_shows_nothing_is_said(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match="no moving pictures"):
        list(frames_at(path, 1))

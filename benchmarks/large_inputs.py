"""Inputs of any size in bounded memory: a long stream, a web archive, an hour of film and of sound, many small files.

    python benchmarks/make_corpus.py build/corpus
    python benchmarks/make_warc.py build/corpus
    python benchmarks/large_inputs.py --corpus build/corpus

Each part runs tools/preprocess_data.py as whole processes with one worker. The stream is the corpus over and over,
each time a frame of one .jsonl.zst; the archive is pages.warc.gz over and over. Both are read undisturbed, and once
more by a run that is killed in the middle and gone on with, to the same bytes. The film (1080p H.264 at 30 frames a
second, with sound) and the recording (MP3) are a few seconds that are made once and written after one another. Peak
memory is that of all processes together.
"""

import argparse
import filecmp
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import psutil
from backports import zstd
from preprocess import Run
from verdict import finish

ROOT = Path(__file__).parents[1]
MAX_RSS_MB = 1_500
"""What a stream may take; a film is held with its frames as JPEG, and may take the limit of a document."""
MAX_DOCUMENT_MB = 4_096 + MAX_RSS_MB
MAX_MS_PER_FILE = 1.0
CLIP_SECONDS, FRAMES_PER_SECOND = 20, 30


def main() -> None:
    """Measure every part and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="the folder that make_corpus.py made")
    parser.add_argument("--work", type=Path, help="where inputs and outputs go (default: below the corpus)")
    parser.add_argument("--gigabytes", type=float, default=5.0, help="of the stream, unpacked (default %(default)s)")
    parser.add_argument("--archive-gigabytes", type=float, default=3.0, help="of the web archive (default %(default)s)")
    parser.add_argument("--minutes", type=int, default=60, help="of the film and the recording (default %(default)s)")
    parser.add_argument("--files", type=int, default=20_000, help="small files (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    arguments = parser.parse_args()
    work = arguments.work or arguments.corpus / "large"
    work.mkdir(parents=True, exist_ok=True)
    held = [PARTS[name](arguments, work) for name in arguments.only]
    peaks = [peak for _, peak in held if peak]
    finish(
        "large_inputs", ours=max(peaks, default=0.0), peer=MAX_RSS_MB, bar=1.0, holds=all(holds for holds, _ in held)
    )


def run(arguments: argparse.Namespace, inputs: Path, out: Path, *, kill_at: float | None = None) -> Run:
    """Run the tool, and kill it when its tokens have `kill_at` bytes; return what it cost."""
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(inputs), "--workers", "1"]
    command += ["--output-prefix", f"{out}/p", "--tokenizer", str(arguments.corpus / "gpt2" / "tokenizer.json")]
    out.mkdir(parents=True, exist_ok=True)
    started, peak = time.perf_counter(), 0.0
    with open(out.with_suffix(".log"), "w") as log:
        tool = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})
    tokens = out / "p.bin.partial"
    while True:
        pid, status, usage = os.wait4(tool.pid, os.WNOHANG)
        if pid:
            break
        peak = max(peak, resident_mb(tool.pid))
        if kill_at is not None and tokens.exists() and tokens.stat().st_size >= kill_at:
            tool.send_signal(signal.SIGKILL)
        time.sleep(0.05)
    tool.returncode = os.waitstatus_to_exitcode(status)
    if tool.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise SystemExit(
            f"{' '.join(command)} ended with {tool.returncode}:\n{out.with_suffix('.log').read_text()[-3000:]}"
        )
    return Run(usage.ru_utime + usage.ru_stime, time.perf_counter() - started, peak)


def resident_mb(pid: int) -> float:
    """Return the resident memory of a process and its children, in MB."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total / 1e6


def fresh(folder: Path) -> Path:
    """Return a folder that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def stream(arguments: argparse.Namespace, work: Path) -> tuple[bool, float]:
    """Read a long .jsonl.zst, undisturbed and killed; return whether the bytes are the same, and the peak memory."""
    corpus = arguments.corpus / "corpus.jsonl"
    frame = zstd.compress(corpus.read_bytes(), level=3)
    times = max(2, round(arguments.gigabytes * 1e9 / corpus.stat().st_size))
    inputs = fresh(work / "stream") / "corpus.jsonl.zst"
    write_over_and_over(inputs, frame, times)
    megabytes = corpus.stat().st_size * times / 1e6
    return killed_alike(arguments, work, inputs, f"stream, {megabytes:.0f} MB unpacked", megabytes)


def archive(arguments: argparse.Namespace, work: Path) -> tuple[bool, float]:
    """Read a long web archive, as `stream` does."""
    pages = arguments.corpus / "pages.warc.gz"
    times = max(2, round(arguments.archive_gigabytes * 1e9 / pages.stat().st_size))
    inputs = fresh(work / "archive") / "pages.warc.gz"
    write_over_and_over(inputs, pages.read_bytes(), times)
    return killed_alike(arguments, work, inputs, "web archive", inputs.stat().st_size / 1e6)


def write_over_and_over(path: Path, data: bytes, times: int) -> None:
    """Write the same bytes so many times after one another."""
    with path.open("wb") as file:
        for _ in range(times):
            file.write(data)


def killed_alike(
    arguments: argparse.Namespace, work: Path, inputs: Path, name: str, megabytes: float
) -> tuple[bool, float]:
    """Read an input undisturbed and killed; return whether the bytes are the same, and the peak memory."""
    whole, killed = fresh(work / "whole"), fresh(work / "killed")
    undisturbed = run(arguments, inputs, whole)
    first = run(arguments, inputs, killed, kill_at=(whole / "p.bin").stat().st_size / 2)
    second = run(arguments, inputs, killed)
    names = sorted(path.name for path in whole.iterdir())
    _, differ, missing = filecmp.cmpfiles(whole, killed, names, shallow=False)
    same = not differ and not missing and names == sorted(path.name for path in killed.iterdir())
    print(f"\n{name}: {inputs.stat().st_size / 1e9:.2f} GB on disk")
    print_row("undisturbed", undisturbed, f"{megabytes / undisturbed.cpu_seconds:.0f} MB a CPU-second")
    print_row("killed in the middle", first, "")
    print_row("gone on with", second, "the same bytes" if same else "OTHER BYTES")
    peak = max(one.rss_mb for one in (undisturbed, first, second))
    return same and peak <= MAX_RSS_MB, peak


def film(arguments: argparse.Namespace, work: Path) -> tuple[bool, float]:
    """Read a film; return whether all of it was read, within the memory of a document."""
    path = fresh(work / "film") / "film.mp4"
    repeat(make_clip(work / "clip.mp4"), path, times=arguments.minutes * 60 // CLIP_SECONDS)
    return document(arguments, path, work, items=2 * arguments.minutes * 60)


def recording(arguments: argparse.Namespace, work: Path) -> tuple[bool, float]:
    """Read a recording; return whether all of it was read, within the memory of a document."""
    path = fresh(work / "recording") / "recording.mp3"
    repeat(make_sound(work / "clip.mp3"), path, times=arguments.minutes * 60 // CLIP_SECONDS)
    return document(arguments, path, work, items=arguments.minutes * 2)


def document(arguments: argparse.Namespace, path: Path, work: Path, *, items: int) -> tuple[bool, float]:
    """Read one long document and say what it cost; its memory is not that of a stream, and not returned."""
    cost = run(arguments, path, fresh(work / "out"))
    (said,) = [line for line in (work / "out.log").read_text().splitlines() if line.startswith("media items:")]
    found = sum(int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", said))
    print(f"\n{path.name}: {arguments.minutes} minutes, {path.stat().st_size / 1e6:.0f} MB; {said}")
    print_row("read", cost, f"{60 * cost.cpu_seconds / arguments.minutes:.0f} CPU-seconds an hour")
    return found >= 0.99 * items and cost.rss_mb <= MAX_DOCUMENT_MB, 0.0


def files(arguments: argparse.Namespace, work: Path) -> tuple[bool, float]:
    """Read many small files; return whether each takes less than it may, start-up left out."""
    rng, folder = np.random.default_rng(0), fresh(work / "files")
    words = (arguments.corpus / "corpus.jsonl").open(encoding="utf-8").read(2_000_000).split()
    costs = []
    for count in (10, arguments.files):
        fresh(folder)
        for number in range(count):
            start = int(rng.integers(0, len(words) - 100))
            (folder / f"{number:06d}.txt").write_text(" ".join(words[start : start + 80]) + "\n")
        costs.append(run(arguments, folder, fresh(work / "out")))
    ms = 1e3 * (costs[1].cpu_seconds - costs[0].cpu_seconds) / (arguments.files - 10)
    print(f"\n{arguments.files:,} files of about 500 bytes")
    print_row("read", costs[1], f"{ms:.2f} ms of CPU time a file")
    return ms <= MAX_MS_PER_FILE, costs[1].rss_mb


PARTS: dict[str, Callable[[argparse.Namespace, Path], tuple[bool, float]]] = {
    "stream": stream,
    "archive": archive,
    "film": film,
    "recording": recording,
    "files": files,
}


def print_row(name: str, cost: Run, more: str) -> None:
    """Print what one run cost."""
    print(
        f"  {name:<22}{cost.cpu_seconds:>9.1f} CPU s{cost.wall_seconds:>9.1f} s{cost.rss_mb:>8.0f} MB  {more}",
        flush=True,
    )


def make_clip(path: Path) -> Path:
    """Write a few seconds of a wall that moves behind some noise, with a tone."""
    rng, height, width = np.random.default_rng(0), 1080, 1920
    wall = np.kron(
        rng.integers(0, 255, (height // 8 + 80, width // 8 + 160, 3), np.uint8), np.ones((8, 8, 1), np.uint8)
    )
    noise = rng.integers(0, 12, (height, width, 3), np.uint8)
    with av.open(str(path), "w") as container:
        picture = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"preset": "veryfast", "crf": "23"})
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", rate=44_100, layout="stereo")
        for number in range(CLIP_SECONDS * FRAMES_PER_SECOND):
            top, left = number % 600, (2 * number) % 1200
            pixels = wall[top : top + height, left : left + width] // 2 + np.roll(noise, 7 * number, axis=1)
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(picture.encode(None))
        add_tone(container, sound, 2)
    return path


def make_sound(path: Path) -> Path:
    """Write a few seconds of a tone as MP3."""
    with av.open(str(path), "w", options={"write_xing": "0"}) as container:
        add_tone(container, container.add_stream("libmp3lame", rate=44_100, layout="mono"), 1)
    return path


def add_tone(container: av.container.OutputContainer, sound: av.AudioStream, channels: int) -> None:
    """Encode a tone that wavers."""
    times = np.arange(44_100 * CLIP_SECONDS) / 44_100
    samples = (0.3 * np.sin(2 * np.pi * (440 + 40 * np.sin(times)) * times)).astype(np.float32)
    for start in range(0, len(samples), 1024):
        block = np.ascontiguousarray(np.tile(samples[start : start + 1024], (channels, 1)))
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout="stereo" if channels == 2 else "mono")
        frame.sample_rate, frame.pts = 44_100, start
        container.mux(sound.encode(frame))
    container.mux(sound.encode(None))


def repeat(clip: Path, path: Path, *, times: int) -> None:
    """Write a clip so many times after one another, without encoding it again."""
    last: dict[int, int] = {}
    with av.open(str(path), "w", options={"write_xing": "0"} if path.suffix == ".mp3" else {}) as target:
        for number in range(times):
            with av.open(str(clip)) as source:
                if not number:
                    streams = [target.add_stream_from_template(stream) for stream in source.streams]
                for packet in source.demux():
                    offset = int(number * CLIP_SECONDS / packet.time_base)
                    # The first packets of sound, which a decoder only warms up on, lie before the clip.
                    if packet.dts is not None and packet.dts + offset > last.get(packet.stream.index, -(2**62)):
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        last[packet.stream.index] = packet.dts
                        packet.stream = streams[packet.stream.index]
                        target.mux(packet)


if __name__ == "__main__":
    main()

"""Decoding: images beside timm's transform, and how well a tone that must vanish does so in every sound format.

    python benchmarks/media_decode.py [FOLDER]

FOLDER holds photographs (.jpg; default: those of examples/sample_data). Peer: `pip install --no-deps timm==1.0.31`.

Images: encoded bytes to (3, 224, 224), one thread, timm's evaluation transform with crop_mode=squash beside the
reference decoder and DALI's CPU operators; interleaved rounds, CPU time, medians. Sound: a 10 kHz tone at 44.1 kHz in
every format becomes 16 kHz, which cannot hold it: what is left is leak.
"""

import io
import resource
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from verdict import finish

from megatron_mm import config as configs
from megatron_mm.data.media import make_decoders, reference_decoders
from megatron_mm.errors import DataError
from megatron_mm.ingest.audio import read_audio
from megatron_mm.ingest.image import read_image
from megatron_mm.modalities import default_geometries
from megatron_mm.modalities.audio.spec import decode_flac
from megatron_mm.modalities.decoder import Decoder

PHOTOS = Path(__file__).parents[1] / "examples" / "sample_data" / "train" / "photos"
ROUNDS, NAME, SPEED_BAR = 3, "media_decode", 0.5
LEAK_BAR_DB, DIFFERENCE_BAR = -90.0, 1
RATE, TONE_HZ, SECONDS, AMPLITUDE = 44_100, 10_000, 3, 0.5
FORMATS = {
    "wav": ("wav", "pcm_s16le"),
    "flac": ("flac", "flac"),
    "mp3": ("mp3", "libmp3lame"),
    "ogg": ("ogg", "libopus"),
    "m4a": ("ipod", "aac"),
}
"""Container and codec of each format of the claim."""

Decode = Callable[[list[bytes]], list[torch.Tensor]]


def timm_images(encoded: list[bytes]) -> list[torch.Tensor]:
    """Decode as timm trains and evaluates: Pillow, its transform, to 8 bits again for comparison."""
    transform = create_transform(
        224, crop_mode="squash", crop_pct=1.0, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    return [(transform(Image.open(io.BytesIO(data)).convert("RGB")) * 255).round().to(torch.uint8) for data in encoded]


def cpu_seconds() -> float:
    """Return the CPU time of all threads of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_images(encoded: list[bytes]) -> tuple[dict[str, float], int]:
    """Print images per CPU-second of each decoder; return them, and the largest difference of ours from timm."""
    dali = make_decoders(configs.load("tiny", ["data.decoder=dali"]), has_gpu=False)["image"]
    reference = reference_decoders(default_geometries())["image"]

    def first_units(decoder: Decoder) -> Decode:
        return lambda encoded: [units[0] for units in decoder.decode(encoded)]

    decoders: dict[str, Decode] = {
        "megatron_mm": first_units(reference),
        "timm": timm_images,
        "DALI, CPU": first_units(dali),
    }
    expected = torch.stack(timm_images(encoded)).int()
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    differences = {}
    for _ in range(ROUNDS):
        for name, decode in decoders.items():
            start = cpu_seconds()
            images = decode(encoded)
            seconds[name].append(cpu_seconds() - start)
            differences[name] = (torch.stack(images).int() - expected).abs()
    speeds = {name: len(encoded) / statistics.median(times) for name, times in seconds.items()}
    print(f"{len(encoded)} photographs\n{'':14}{'images/CPU-s':>14}{'mean diff':>12}{'max diff':>10}  (of 255)")
    for name, speed in speeds.items():
        mean, most = differences[name].float().mean().item(), differences[name].max().item()
        print(f"{name:14}{speed:>14.1f}{mean:>12.4f}{most:>10}")
    return speeds, int(differences["megatron_mm"].max())


def encode_tone(container: str, codec: str) -> bytes:
    """Return a stereo file of the tone."""
    time = np.arange(SECONDS * RATE) / RATE
    wave = (AMPLITUDE * np.sin(2 * np.pi * TONE_HZ * time)).astype(np.float32)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        rate = 48_000 if codec == "libopus" else RATE
        stream = output.add_stream(codec, rate=rate, layout="stereo")
        resampler = av.AudioResampler(stream.format, "stereo", rate, frame_size=stream.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        frame.sample_rate = RATE
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            output.mux(stream.encode(part))
    return buffer.getvalue()


def leak_db(samples: np.ndarray) -> float:
    """Return the strongest line left of the tone where it would alias to, 6 kHz, against its amplitude."""
    inner = samples[8_000:-8_000] * np.hanning(len(samples) - 16_000)
    spectrum = np.abs(np.fft.rfft(inner)) * 4 / len(inner)
    frequencies = np.fft.rfftfreq(len(inner), 1 / 16_000)
    near = np.abs(frequencies - (16_000 - TONE_HZ)) < 200
    return float(20 * np.log10(max(spectrum[near].max() / AMPLITUDE, 1e-12)))


def measure_sound() -> float:
    """Print the leak of each format; return the worst."""
    print(f"\n{'':8}{'seconds':>10}{'leak, dB':>12}   (a {TONE_HZ} Hz tone in 16 kHz sound)")
    leaks = []
    for name, (container, codec) in FORMATS.items():
        samples = decode_flac(read_audio(encode_tone(container, codec)).data)
        leaks.append(leak_db(samples))
        print(f"{name:8}{len(samples) / 16_000:>10.2f}{leaks[-1]:>12.1f}")
    return max(leaks)


def main() -> None:
    """Measure images and sound, and end in the verdict."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else PHOTOS
    encoded = []
    for path in sorted(folder.rglob("*.[jJ][pP]*[gG]")):
        try:
            encoded.append(read_image(path.read_bytes()).data)
        except DataError as error:
            print(f"{path.name} is left out: {error}")
    speeds, difference = measure_images(encoded)
    holds = measure_sound() <= LEAK_BAR_DB and difference <= DIFFERENCE_BAR
    finish(NAME, ours=1 / speeds["megatron_mm"], peer=1 / speeds["timm"], bar=SPEED_BAR, holds=holds)


if __name__ == "__main__":
    main()

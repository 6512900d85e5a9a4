"""The smallest model and data that still have every part: what most tests train."""

import atexit
import functools
import io
import itertools
import json
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.ingest.document import AudioSegment, Document, ImageSegment, Segment, TextSegment
from megatron_mm.ingest.encode import encode_document
from megatron_mm.modalities import MODALITIES, Geometries
from megatron_mm.modalities.audio.spec import SAMPLE_RATE, encode_flac
from megatron_mm.shards import ShardWriter
from megatron_mm.shards.format import BLOCK_BYTES, PAGE_BYTES, PAGED, PAGES_SUFFIX
from megatron_mm.shards.writer import write_manifest
from megatron_mm.source import Source
from megatron_mm.tokenizer import TextTokenizer, train_tokenizer

VOCAB_SIZE = 320
WORDS = "the a of and to in on by red blue tall small lake hill bird house sees sings under over near far"
SMALL = (
    *("model.hidden_size=32", "model.ffn_hidden_size=48", "model.num_attention_heads=4", "model.head_dim=8"),
    *("model.vocab_size=320", "image.hidden_size=16", "image.ffn_hidden_size=32", "image.num_attention_heads=2"),
    *("audio.hidden_size=16", "audio.ffn_hidden_size=32", "audio.num_attention_heads=2", "audio.conv_channels=8"),
    *("audio.pos_conv_kernel=8", "audio.pos_conv_groups=2", "data.seq_len=256", "data.prefetch_steps=0"),
    # Frozen, for speed: `small_config` names the pretrained files without which a frozen encoder does not start.
    *("image.trainable=false", "audio.trainable=false", "image.pretrained=null", "audio.pretrained=null"),
    *("training.global_batch_size=8", "training.micro_batch_size=1", "training.steps=6", "schedule.warmup_steps=2"),
    *("checkpoint.interval=0", "evaluation.interval=0", "logging.tensorboard=false"),
    # AdamW turns a gradient that is nothing but rounding into a whole step of either sign; not with this.
    "optimizer.epsilon=1e-6",
)
"""Overrides of the preset tiny; six layers and two slots, so that every layout up to pp=2 vpp=2 or pp=4 fits."""


TRAINED = ("image.trainable=true", "audio.trainable=true")
"""Overrides that train the encoders too."""


def small_config(shards: str | Path, run_dir: str | Path, *overrides: str) -> Config:
    """Return the small model's configuration over `shards`; its encoders start from pretrained files."""
    data = [f"data.train=[{shards}]", "data.validation=[]", f"run_dir={run_dir}"]
    form = next((text.partition("=")[2] for text in reversed(overrides) if text.startswith("audio.form=")), "ls960")
    return configs.load("tiny", [*SMALL, *data, *pretrained(form), *overrides])


@functools.cache
def pretrained(form: str) -> tuple[str, ...]:
    """Return overrides that name pretrained files of the small encoders, which are there until this process ends."""
    import torch
    from safetensors.torch import save_file

    folder = tempfile.TemporaryDirectory(prefix="megatron-mm-encoders-")
    atexit.register(folder.cleanup)
    config, overrides = configs.load("tiny", [*SMALL, f"audio.form={form}"]), []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        towers = {own.name: own.part("encoder").Encoder(getattr(config, own.name)).tower for own in MODALITIES}
    for name, tower in towers.items():
        path = Path(folder.name, f"{name}.safetensors")
        save_file({key: value.detach().contiguous() for key, value in tower.named_parameters()}, path)
        overrides.append(f"{name}.pretrained={path}")
    return tuple(overrides)


def layout(text: str) -> list[str]:
    """Turn 'tp=2 pp=2' into overrides."""
    return [f"parallel.{part}" for part in text.split()]


def sentence(rng: np.random.Generator, words: int) -> str:
    """Return `words` random words."""
    return " ".join(rng.choice(WORDS.split(), words)) + "\n"


def png(rng: np.random.Generator, width: int = 40, height: int = 30) -> bytes:
    """Return a PNG of smooth colours."""
    small = rng.integers(0, 255, (3, 4, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


def tone(rng: np.random.Generator, num_samples: int) -> np.ndarray:
    """Return a chirp: (num_samples,) float32."""
    time = np.arange(num_samples) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * (rng.uniform(100, 900) * time + 200 * time**2))).astype(np.float32)


def save_tokenizer(path: Path) -> Path:
    """Write a tokenizer of VOCAB_SIZE ids that knows WORDS."""
    rng = np.random.default_rng(0)
    train_tokenizer([sentence(rng, 40) for _ in range(200)], vocab_size=VOCAB_SIZE).save(str(path))
    return path


def documents(seed: int = 0, image_sizes: Sequence[tuple[int, int]] = ((40, 30),)) -> list[Document]:
    """Return documents of every kind and many lengths: short and long text, captions, speech, and pages of both.

    Some samples hold no media and some hold several items; one recording ends in a part of a second, and one document
    is longer than a sample. Images have the widths and heights `image_sizes`, in turn.
    """
    rng, sizes = np.random.default_rng(seed), itertools.cycle(image_sizes)

    def text(words: int) -> TextSegment:
        return TextSegment(sentence(rng, words))

    def image() -> ImageSegment:
        return ImageSegment(png(rng, *next(sizes)))

    def audio(num_samples: int) -> AudioSegment:
        return AudioSegment(encode_flac(tone(rng, num_samples)), num_samples)

    made: list[tuple[list[Segment], Source]] = [([text(int(words))], Source.TEXT) for words in rng.integers(3, 150, 40)]
    made += [([image(), text(int(words))], Source.IMAGE) for words in rng.integers(3, 20, 12)]
    made += [([audio(int(samples)), text(6)], Source.AUDIO) for samples in rng.integers(6_000, 50_000, 8)]
    made += [([text(20), image(), text(300), audio(20_000), text(60), image(), text(9)], Source.PDF)]
    made += [([text(4)], Source.TEXT) for _ in range(20)]
    return [Document(segments, source) for segments, source in made]


def write_shards(
    folder: Path,
    name: str = "train",
    *,
    seed: int = 0,
    text_only: bool = False,
    geometries: Geometries | None = None,
    image_sizes: Sequence[tuple[int, int]] = ((40, 30),),
) -> Path:
    """Write the documents, or those without media, as shards `folder/name` and return the prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    tokenizer = TextTokenizer(path if path.exists() else save_tokenizer(path))
    with ShardWriter(
        folder / name, tokenizer=tokenizer.info, tokenizer_content=tokenizer.content, geometries=geometries
    ) as writer:
        for document in documents(seed, image_sizes):
            if text_only and document.source is not Source.TEXT:
                continue
            writer.add(encode_document(document, tokenizer, geometries=geometries))
    return folder / name


def seal(prefix: Path, *, version: int = 2) -> None:
    """Give shards the checksums of what their files hold now, as a writer with a defect would, or an older one."""
    manifest = json.loads(Path(f"{prefix}.json").read_text())
    data = {suffix: Path(f"{prefix}{suffix}").read_bytes() for suffix in manifest["files"]}
    pages = b"".join(np.asarray(_crc32s(data[suffix], PAGE_BYTES), "<u4").tobytes() for suffix in PAGED)
    Path(f"{prefix}{PAGES_SUFFIX}").write_bytes(pages)
    files = {suffix: _summary(content) for suffix, content in data.items()}
    manifest |= {"version": version, "files": files, "pages": _summary(pages)}
    write_manifest(str(prefix), manifest)
    if version == 1:
        del manifest["pages"], manifest["sha256"]
        Path(f"{prefix}{PAGES_SUFFIX}").unlink()
        Path(f"{prefix}.json").write_text(json.dumps(manifest))


def _summary(data: bytes) -> dict[str, object]:
    return {"bytes": len(data), "block_crc32": _crc32s(data, BLOCK_BYTES)}


def _crc32s(data: bytes, size: int) -> list[int]:
    return [zlib.crc32(data[start : start + size]) for start in range(0, len(data), size)]

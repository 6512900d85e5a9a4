"""A random byte flipped in each kind of file that a run depends on: seen at opening, at reading, or harmless.

    python benchmarks/bit_flips.py [--trials 500] [--seed 0]

Every trial changes one random byte of one random file to another value, reads what a run would read of it, and puts the
byte back. It is detected if opening or reading says so by name (DataError, ConfigError, or an image that is left
blank), and harmless if all that was read is what it was, bit for bit. Anything else, a traceback too, is undetected.
Shards are read sample by sample as training does, without what a start compares beforehand; the checkpoint is a run's
of four ranks, resumed and started from; imports and exports are made from it.
"""

import argparse
import collections
import hashlib
import json
import logging
import random
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from small import SMALL, write_shards

from megatron_mm import config as configs
from megatron_mm.checkpoint.format import TOKENIZER, read_manifest
from megatron_mm.checkpoint.index import CheckpointReader, TensorSource
from megatron_mm.checkpoint.verify import check_source, find_damage
from megatron_mm.data.loader import Loader
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.export import export, verify_if_listed
from megatron_mm.hf.files import CARD, MANIFEST
from megatron_mm.hf.load import import_folder
from megatron_mm.hf.tensors import SafetensorsReader
from megatron_mm.shards import merge, stored_tokenizer

RUN = Path(__file__).parent.parent / "tests" / "fixtures" / "run_before_modalities.tar.xz"
OUTCOMES = ("at opening", "at reading", "harmless", "undetected")


@dataclass(frozen=True)
class Kind:
    """Files that are read in one way."""

    name: str
    files: tuple[Path, ...]
    read: Callable[[], Iterator[bytes]]
    """Yields something, maybe nothing, when all is open, and then what is read."""


def main() -> None:
    """Try as many flips as were asked for, print what came of them by kind, and say whether all were seen."""
    from verdict import finish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        counts = try_flips(make(Path(folder)), trials=arguments.trials, seed=arguments.seed)
    print(f"{'a byte flipped in':<36}{'flips':>7}" + "".join(f"{outcome:>12}" for outcome in OUTCOMES))
    for name, own in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        print(f"{name:<36}{own.total():>7}" + "".join(f"{own[outcome]:>12}" for outcome in OUTCOMES))
    undetected = sum(own["undetected"] for own in counts.values())
    finish("bit_flips", ours=undetected, peer=1, bar=0)


def make(folder: Path) -> list[Kind]:
    """Write a run's files of every kind under `folder`."""
    prefix = write_shards(folder / "shards")
    merged = folder / "shards" / "all"
    merge(merged, [str(prefix)])
    with tarfile.open(RUN) as archive:
        archive.extractall(folder / "run", filter="data")
    (saved,) = folder.glob("run/run/checkpoints/step_*")
    export(saved, folder / "out")
    imported = folder / "imported"
    import_folder(folder / "out" / "full", imported, preset=str(saved / "config.yaml"))
    kinds = [
        Kind(f"shards {suffix}", (Path(f"{prefix}{suffix}"),), lambda: read_shards(prefix))
        for suffix in (".bin", ".idx", ".media.bin", ".media.idx", ".crc", ".json", ".tokenizer")
    ]
    kinds.append(Kind("shards .json of a merge", (Path(f"{merged}.json"),), lambda: read_shards(merged)))
    kinds.append(Kind("checkpoint, resumed", _in(saved), lambda: read_own(saved)))
    kinds.append(Kind("checkpoint, started from", _in(saved), lambda: read_source(saved)))
    kinds.append(Kind("import, started from", _in(imported), lambda: read_source(imported)))
    exports = [folder / "out" / kind for kind in ("text", "image", "full")]
    kinds += [Kind(f"export {path.name}", _in(path), lambda path=path: read_export(path)) for path in exports]
    return kinds


def _in(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(path for path in folder.iterdir() if path.is_file()))


def try_flips(kinds: list[Kind], *, trials: int, seed: int) -> dict[str, collections.Counter]:
    """Return how often each outcome came, by kind of file; kinds take turns."""
    rng = random.Random(seed)
    expected = {kind.name: digest(kind.read())[1] for kind in kinds}
    counts = {kind.name: collections.Counter() for kind in kinds}
    for number in range(trials):
        kind = kinds[number % len(kinds)]
        path = rng.choice(kind.files)
        offset, change = rng.randrange(path.stat().st_size), rng.randrange(1, 256)
        change_byte(path, offset, change)
        outcome, found = digest(kind.read())
        change_byte(path, offset, change)
        if outcome == "read":
            outcome = "harmless" if found == expected[kind.name] else "undetected"
        counts[kind.name][outcome] += 1
        if outcome == "undetected":
            print(f"undetected: {path.name} byte {offset} xor {change}: {found}", file=sys.stderr)
    return counts


def change_byte(path: Path, offset: int, change: int) -> None:
    """Change a byte, or change it back."""
    with path.open("r+b") as file:
        file.seek(offset)
        before = file.read(1)
        file.seek(offset)
        file.write(bytes([before[0] ^ change]))


def digest(parts: Iterator[bytes]) -> tuple[str, str]:
    """Return ('read', hash of it all), or how it was refused, and with which words."""
    whole, stage = hashlib.sha256(), "at opening"
    try:
        for part in parts:
            stage = "at reading"
            whole.update(part)
    except (DataError, ConfigError) as error:
        return stage, str(error)
    except Exception as error:  # no way to say that a file is damaged
        return "undetected", repr(error)
    return "read", whole.hexdigest()


def read_shards(prefix: Path) -> Iterator[bytes]:
    """Read every sample and every item, as all ranks of a run do together."""
    config = configs.load("tiny", [*SMALL, f"data.train=[{prefix}]", "run_dir=unused"])
    ranks = {f"{axis}_rank": 0 for axis in ("tp", "cp", "dp")} | {f"{axis}_size": 1 for axis in ("tp", "cp", "dp")}
    mesh = SimpleNamespace(**ranks, is_first_chunk=lambda chunk: False, is_rank_0=False)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    yield stored_tokenizer(str(prefix)) or b""
    for sample in range(loader.num_samples):
        batch = loader.micro_batch([sample])
        for name in ("tokens", "labels", "loss_mask", "origins", "positions"):
            yield getattr(batch, name).numpy().tobytes()
        for _, document, _, _ in loader.samples.pieces(sample).tolist():
            for item in loader.shards[0].media(document):
                yield item.tobytes()
                yield loader.shards[0].media_bytes(item)


def read_own(path: Path) -> Iterator[bytes]:
    """Read a checkpoint as the run that saved it does when it goes on."""
    if problems := find_damage(path):
        raise DataError("\n".join(problems))
    yield b""
    manifest = read_manifest(path)
    yield json.dumps(manifest, sort_keys=True).encode()
    for name in manifest["bytes"]:
        yield (path / name).read_bytes()


def read_source(path: Path) -> Iterator[bytes]:
    """Read a checkpoint as a new run does that starts from it, and as an export does."""
    reader = CheckpointReader(path)
    check_source(path)
    yield f"{reader.step}".encode()
    yield from _tensors(reader)
    yield configs.to_yaml(configs.load_saved(path / "config.yaml")).encode()
    yield (path / TOKENIZER).read_bytes()


def read_export(folder: Path) -> Iterator[bytes]:
    """Read an export as generation and imports do: all but its card and its list of hashes."""
    verify_if_listed(folder)
    yield b""
    yield from _tensors(SafetensorsReader(folder))
    for path in _in(folder):
        if path.name not in (CARD, MANIFEST):
            yield path.read_bytes()


def _tensors(source: TensorSource) -> Iterator[bytes]:
    for name, info in sorted(source.tensors.items()):
        yield f"{name} {info}".encode()
        yield source.read_rows(name, 0, info.shape[0]).contiguous().view(-1).view(torch.uint8).numpy().tobytes()


if __name__ == "__main__":
    main()

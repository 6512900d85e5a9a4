"""Show what the model will see of a file, a stored document, a packed sample, or a step of a run: text, pixels, audio.

python tools/inspect_data.py --tokenizer tokenizer.json --input report.pdf --html report.html
python tools/inspect_data.py --tokenizer tokenizer.json --shards data/train --document 12
python tools/inspect_data.py --tokenizer tokenizer.json --shards data/train --sample 0 --seq-len 8192 --html s.html
python tools/inspect_data.py --run runs/mine --step 120               which samples of which datasets the step sees
python tools/inspect_data.py --run tiny --step 1 --html step.html     and what is in them, before there is a run
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_mm.engine import device

device.keep_out_accelerators()  # before megatron-core is imported

from megatron_mm import config as configs
from megatron_mm import endings
from megatron_mm.data.media import reference_decoders
from megatron_mm.data.packing import plan_packing
from megatron_mm.data.rendering import piece_of, render_page, render_text
from megatron_mm.data.samples import Samples
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest.encode import encode_document
from megatron_mm.ingest.work_items import DEFAULTS, WorkItem, read_all
from megatron_mm.modalities import default_geometries
from megatron_mm.printable import line
from megatron_mm.shards import EncodedDocument, ShardReader, open_shards
from megatron_mm.shards.format import TOKENIZER_SUFFIX
from megatron_mm.tokenizer import TextTokenizer
from megatron_mm.training import checkpoints


def main() -> int:
    parser = endings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", metavar="T", help="the tokenizer.json of --input and --shards")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", type=Path, metavar="FILE", help="a file, read and encoded now")
    what.add_argument("--shards", metavar="P", help="the prefix of shards")
    what.add_argument("--run", metavar="R", help="a run_dir, a preset or a YAML file: with --step")
    parser.add_argument(
        "--step", type=endings.at_least(0), metavar="N", help="which step of the run, counted from 1 as in its log"
    )
    parser.add_argument(
        "--document", type=endings.at_least(0), default=0, metavar="N", help="which of their documents (default 0)"
    )
    parser.add_argument(
        "--sample", type=endings.at_least(0), metavar="N", help="which of their packed samples, instead of a document"
    )
    parser.add_argument(
        "--seq-len",
        type=endings.at_least(1, below=2**31),
        default=8192,
        metavar="L",
        help="tokens of a sample (default 8192)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows media, instead of printing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of --run that differ")
    arguments = parser.parse_intermixed_args()
    if (arguments.run is None) == (arguments.tokenizer is None) or (arguments.run is None) != (arguments.step is None):
        parser.error("--input and --shards go with --tokenizer, --run with --step")
    return endings.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.run:
        samples, batch = _step(arguments.run, arguments.step, arguments.overrides)
        if arguments.html is None:
            print("\n".join(map(line, _order(samples, batch))))
            return
        tokenizer = TextTokenizer(samples.shards[0].prefix + TOKENIZER_SUFFIX)
        documents, geometries = list(_batch(samples, batch)), samples.config.encoders
    elif arguments.input:
        tokenizer, geometries = TextTokenizer(arguments.tokenizer), default_geometries()
        tokenizer.require_every_text()
        documents = list(_file(arguments.input, tokenizer))
    else:
        tokenizer, shards = TextTokenizer(arguments.tokenizer), open_shards([arguments.shards])
        documents, geometries = list(_stored(arguments, shards, tokenizer)), shards[0].geometries
    if arguments.html:
        page = render_page(documents, tokenizer, decoders=reference_decoders(geometries))
        arguments.html.write_text(page, encoding="utf-8")
        print(f"{len(documents)} documents: {line(arguments.html)}")
    else:
        for title, document in documents:
            print(f"{line(title)}\n{render_text(document, tokenizer)}")


def _file(path: Path, tokenizer: TextTokenizer) -> Iterator[tuple[str, EncodedDocument]]:
    if not path.is_file():
        raise DataError(
            f"{path} is a folder: give a file." if path.is_dir() else f"{path} does not exist. Give a file."
        )
    count, reason = 0, "it is empty"
    for documents, rejections in read_all(WorkItem(path), DEFAULTS):
        for rejection in rejections:
            reason = rejection.reason
            print(f"rejected {line(rejection.path)}: {line(reason)}", file=sys.stderr)
        for document in documents:
            yield f"{path}, document {count}", encode_document(document, tokenizer)
            count += 1
    if not count:
        raise DataError(f"{path} gives no document: {reason}. Give another file.")


def _stored(
    arguments: argparse.Namespace, shards: Sequence[ShardReader], tokenizer: TextTokenizer
) -> Iterator[tuple[str, EncodedDocument]]:
    if shards[0].tokenizer != tokenizer.info:
        raise DataError(
            f"{arguments.shards} was made with another tokenizer than {arguments.tokenizer}: give "
            f"{shards[0].prefix}{TOKENIZER_SUFFIX}."
        )
    if arguments.sample is None:
        if not 0 <= arguments.document < shards[0].num_documents:
            raise ConfigError(
                f"--document {arguments.document} is none of the {shards[0].num_documents} of {arguments.shards}. Use "
                f"0 to {shards[0].num_documents - 1}."
            )
        yield f"{arguments.shards}, document {arguments.document}", shards[0].document(arguments.document)
        return
    plan = plan_packing(shards, seq_len=arguments.seq_len)
    if not 0 <= arguments.sample < plan.num_samples:
        raise ConfigError(
            f"--sample {arguments.sample} is none of the {plan.num_samples} of {arguments.shards} with --seq-len "
            f"{arguments.seq_len}. Use 0 to {plan.num_samples - 1}."
        )
    for piece in plan.sample(arguments.sample):
        yield f"sample {arguments.sample}: {_describe(piece)}", piece_of(shards, piece)


def _describe(piece: np.void) -> str:
    start, length = int(piece["start"]), int(piece["length"])
    return f"tokens {start:,} to {start + length:,} of document {piece['document']}"


def _step(run: str, step: int, overrides: Sequence[str]) -> tuple[Samples, np.ndarray]:
    """Return the samples of a run and those of one step, as the run goes on from its newest checkpoint."""
    saved = Path(run) / "config.yaml"
    config = configs.load_saved(saved, overrides) if saved.is_file() else configs.load(run, overrides)
    if not 1 <= step <= config.training.steps:
        raise ConfigError(f"--step {step} is not one of the {config.training.steps} steps of {run}, counted from 1.")
    samples = Samples(config.data.train, config=config, changes=config.data.changes)
    samples.follow(checkpoints.consumption_of(config, checkpoints.newest(config)))
    return samples, samples.of_step(step - 1)


def _order(samples: Samples, batch: np.ndarray) -> Iterator[str]:
    """Yield a line for each sample of a batch, and one for each document in it."""
    for number, sample in enumerate(batch.tolist()):
        dataset = samples.dataset_of(sample)
        own = sample - int(samples.first_sample[dataset])
        yield f"{number}: sample {own:,} of {samples.plans[dataset].num_samples:,} of {samples.datasets[dataset]}"
        for piece in samples.pieces(sample):
            shard = samples.shards[int(piece["shard"])]
            source = shard.source(int(piece["document"])).name.lower()
            yield f"    {source:<6} {_describe(piece)} of {shard.prefix}"


def _batch(samples: Samples, batch: np.ndarray) -> Iterator[tuple[str, EncodedDocument]]:
    for number, sample in enumerate(batch.tolist()):
        for piece in samples.pieces(sample):
            yield (
                f"{number}: {_describe(piece)} of {samples.shards[int(piece['shard'])].prefix}",
                piece_of(samples.shards, piece),
            )


if __name__ == "__main__":
    sys.exit(main())

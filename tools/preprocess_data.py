"""Turn files into training shards: text, web pages, records, images, recordings, PDFs, and corpora as they are shipped.

--check reads a sample of each kind of input and prints what it would become: begin with that. Writes PREFIX.bin, .idx,
.media.bin, .media.idx, .crc, .origin.parquet (where documents came from), .json (the manifest), .report.json (what
became of everything) and .rejected.jsonl; nothing appears before all is done.
A run that was killed goes on where it was when it is started again with the same arguments, and ends in the same bytes.

Over many machines, as a SLURM array: each task reads its share of the same inputs and writes shards of its own
(PREFIX-00003-of-00064 and so on); `tools/shards.py merge` then makes them one without copying data.
"""

import argparse
import sys
from pathlib import Path

from megatron_mm import config as configs
from megatron_mm import endings
from megatron_mm.environment import read_number
from megatron_mm.errors import ConfigError
from megatron_mm.ingest.check import check
from megatron_mm.ingest.conversations import load_template
from megatron_mm.ingest.fields import Schemas, load_fields
from megatron_mm.ingest.find import find_files
from megatron_mm.ingest.layouts import NAMES
from megatron_mm.ingest.pipeline import preprocess
from megatron_mm.ingest.plan import EVERYTHING, Share, WorkPlan
from megatron_mm.ingest.work_items import Options

PRESET = "mm_88b"


def main() -> int:
    parser = endings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, and folders of files")
    parser.add_argument("--output-prefix", metavar="P", help="where the shards go")
    parser.add_argument("--tokenizer", metavar="T", help="a local tokenizer.json, or a SentencePiece .model")
    parser.add_argument(
        "--check", action="store_true", help="print what a sample of each kind of input would become, and write nothing"
    )
    parser.add_argument(
        "--layout",
        default="",
        metavar="L",
        help=f"how the inputs lie on disk, if it is not to be told by what they are: {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--fields", type=Path, metavar="FILE", help="YAML that says which columns of records are what (docs/corpora.md)"
    )
    parser.add_argument(
        "--workers", type=endings.at_least(1), default=1, metavar="N", help="processes that read (default 1)"
    )
    parser.add_argument(
        "--bad-input",
        choices=("fail", "skip"),
        default="fail",
        help="what cannot be read ends the run (fail, the default), or is left out and listed (skip)",
    )
    parser.add_argument(
        "--trust-content", action="store_true", help="read mislabelled files as what they are instead of rejecting them"
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="read files that links in a folder of --input lead to outside of it, as in the cache of Hugging Face; "
        "otherwise they are bad input",
    )
    parser.add_argument(
        "--max-audio-seconds",
        type=endings.at_least(1),
        default=Options.max_audio_seconds,
        metavar="S",
        help="cut longer recordings into items of this length (default %(default)s)",
    )
    parser.add_argument(
        "--conversations",
        choices=("plain", "template"),
        default="plain",
        help="write conversations as text with the names of their speakers (plain, the default), or by the chat "
        "template that lies beside the tokenizer (template)",
    )
    parser.add_argument(
        "--preset",
        default=PRESET,
        metavar="P",
        help="the model that the shards are for, a preset or a config.yaml: how many tokens an image or a recording "
        "becomes is its (default %(default)s)",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="K=V", help="settings of --preset that differ: image.image_size=336"
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        default=[],
        metavar="L",
        help="take texts of these languages only (ISO 639-1, en de ...), as py3langid tells them by their start",
    )
    parser.add_argument(
        "--min-tokens",
        type=endings.at_least(0),
        default=Options.min_tokens,
        metavar="N",
        help="leave out shorter documents",
    )
    parser.add_argument("--max-tokens", type=endings.at_least(1), metavar="N", help="leave out longer documents")
    parser.add_argument(
        "--tokenizer-engine",
        choices=("auto", "reference"),
        default="auto",
        help="what finds the ids: gigatoken where it agrees with `tokenizers` (auto, the default), or the latter alone",
    )
    parser.add_argument(
        "--task",
        type=int,
        metavar="I",
        help="which share of the inputs to read, from 0 (default: the task of a SLURM array)",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        metavar="N",
        help="shares that the inputs are cut into (default: the tasks of a SLURM array, or 1)",
    )
    arguments = parser.parse_args()
    if not arguments.check and (arguments.output_prefix is None or arguments.tokenizer is None):
        parser.error("--output-prefix and --tokenizer are needed, but for --check")
    return endings.run(lambda: _run(arguments), memory="Use fewer --workers.")


def _run(arguments: argparse.Namespace) -> None:
    share = _share(arguments)
    if arguments.max_tokens is not None and arguments.max_tokens < arguments.min_tokens:
        raise ConfigError(
            f"--min-tokens {arguments.min_tokens} is above --max-tokens {arguments.max_tokens}: no document is both. "
            "Lower it."
        )
    options = Options(
        trust_content=arguments.trust_content,
        max_audio_seconds=arguments.max_audio_seconds,
        languages=tuple(arguments.languages),
        min_tokens=arguments.min_tokens,
        max_tokens=arguments.max_tokens,
        layout=arguments.layout,
        schemas=_schemas(arguments),
        geometries=configs.geometries(configs.load_saved(arguments.preset, arguments.set)),
    )
    if arguments.check:
        _check(arguments, options)
        return
    kept = "what is done is kept, and the same command goes on behind it"
    with endings.note(stop=lambda: kept, disk=f"--output-prefix {arguments.output_prefix}"):
        report = preprocess(
            arguments.input,
            output_prefix=arguments.output_prefix,
            tokenizer_path=arguments.tokenizer,
            workers=arguments.workers,
            skip_bad=arguments.bad_input == "skip",
            options=options,
            engine=arguments.tokenizer_engine,
            share=share,
            follow_links=arguments.follow_links,
        )
    print(report.table(share.prefix(arguments.output_prefix)))


def _schemas(arguments: argparse.Namespace) -> Schemas:
    if arguments.conversations == "template" and arguments.tokenizer is None:
        raise ConfigError("--conversations template is a template beside a tokenizer: give --tokenizer too.")
    template = load_template(Path(arguments.tokenizer)) if arguments.conversations == "template" else None
    return Schemas(load_fields(arguments.fields) if arguments.fields is not None else (), template=template)


def _check(arguments: argparse.Namespace, options: Options) -> None:
    finding = find_files(
        arguments.input,
        follow_links=arguments.follow_links,
        output_prefix=arguments.output_prefix or "",
        tokenizer=arguments.tokenizer or "",
    )
    for text in check(WorkPlan(finding, EVERYTHING, layout=options.layout), options):
        print(text, flush=True)


def _share(arguments: argparse.Namespace) -> Share:
    """Return which share of the inputs is read: as the command line has it, or the task of a SLURM array."""
    task = read_number("SLURM_ARRAY_TASK_ID", 0) if arguments.task is None else arguments.task
    tasks = read_number("SLURM_ARRAY_TASK_COUNT", 1) if arguments.tasks is None else arguments.tasks
    if not 0 <= task < tasks:
        raise ConfigError(f"--task {task} is not one of --tasks {tasks}: they count from 0. Give both alike.")
    return Share(task, tasks)


if __name__ == "__main__":
    sys.exit(main())

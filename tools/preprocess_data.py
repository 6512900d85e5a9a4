"""Turn files into training shards: text, web pages, JSON lines, images, recordings and PDFs.

An image or recording and a text file of the same name beside it become one document, the text last. Writes
PREFIX.bin, .idx, .media.bin, .media.idx, .json (the manifest) and .rejected.jsonl; nothing appears before all is done.
A run that was killed goes on where it was when it is started again with the same arguments, and ends in the same bytes.

Over many machines, as a SLURM array: each task reads its share of the same inputs and writes shards of its own
(PREFIX-00003-of-00064 and so on); `tools/shards.py merge` then makes them one without copying data.
"""

import argparse
import logging
import os
import sys

from megatron_mm.errors import ConfigError, DataError
from megatron_mm.ingest.pipeline import Options, Report, Share, preprocess


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, and folders of files")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="where the shards go")
    parser.add_argument("--tokenizer", required=True, metavar="T", help="a local tokenizer.json")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read (default 1)")
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
        "--max-audio-seconds",
        type=int,
        default=Options.max_audio_seconds,
        metavar="S",
        help="cut longer recordings into items of this length (default %(default)s)",
    )
    parser.add_argument(
        "--languages",
        nargs="+",
        default=[],
        metavar="L",
        help="take texts of these languages only (ISO 639-1, en de ...), as py3langid tells them by their start",
    )
    parser.add_argument(
        "--min-tokens", type=int, default=Options.min_tokens, metavar="N", help="leave out shorter documents"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="leave out longer documents")
    parser.add_argument(
        "--tokenizer-engine",
        choices=("auto", "reference"),
        default="auto",
        help="what finds the ids: gigatoken where it agrees with `tokenizers` (auto, the default), or the latter alone",
    )
    parser.add_argument(
        "--task",
        type=int,
        default=int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)),
        metavar="I",
        help="which share of the inputs to read, from 0 (default: the task of a SLURM array)",
    )
    parser.add_argument(
        "--tasks",
        type=int,
        default=int(os.environ.get("SLURM_ARRAY_TASK_COUNT", 1)),
        metavar="N",
        help="shares that the inputs are cut into (default: the tasks of a SLURM array, or 1)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    if not 0 <= arguments.task < arguments.tasks:
        parser.error(f"--task {arguments.task} is not one of --tasks {arguments.tasks}: they count from 0")
    share = Share(arguments.task, arguments.tasks)
    try:
        report = preprocess(
            arguments.input,
            output_prefix=arguments.output_prefix,
            tokenizer_path=arguments.tokenizer,
            workers=arguments.workers,
            skip_bad=arguments.bad_input == "skip",
            options=Options(
                trust_content=arguments.trust_content,
                max_audio_seconds=arguments.max_audio_seconds,
                languages=tuple(arguments.languages),
                min_tokens=arguments.min_tokens,
                max_tokens=arguments.max_tokens,
            ),
            engine=arguments.tokenizer_engine,
            share=share,
        )
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_summary(report, share.prefix(arguments.output_prefix)))
    return 0


def _summary(report: Report, prefix: str) -> str:
    counts = report.counts
    lines = [
        f"{report.num_inputs} inputs: {counts.documents} documents, {counts.tokens:,} tokens, "
        f"{counts.rejected} rejected",
        "documents by source: " + ", ".join(f"{name} {number}" for name, number in sorted(counts.by_source.items())),
        "media items: " + (", ".join(f"{name} {number}" for name, number in sorted(counts.media.items())) or "none"),
        f"shards: {prefix}.*",
    ]
    lines += [f"  rejected {rejection.path}: {rejection.reason}" for rejection in report.rejections[:10]]
    if counts.rejected > 10:
        lines.append(f"  ... and {counts.rejected - 10} more in {prefix}.rejected.jsonl")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

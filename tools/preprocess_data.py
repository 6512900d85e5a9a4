"""Turn files into training shards: text, web pages, JSON lines, images, recordings and PDFs.

An image or recording and a text file of the same name beside it become one document, the text last. Writes
PREFIX.bin, .idx, .media.bin, .media.idx, .json (the manifest) and .rejected.jsonl; nothing appears before all is done.
"""

import argparse
import sys

from megatron_mm.errors import DataError
from megatron_mm.ingest.pipeline import Options, Report, preprocess


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
    arguments = parser.parse_args()
    try:
        report = preprocess(
            arguments.input,
            output_prefix=arguments.output_prefix,
            tokenizer_path=arguments.tokenizer,
            workers=arguments.workers,
            skip_bad=arguments.bad_input == "skip",
            options=Options(arguments.trust_content, arguments.max_audio_seconds),
        )
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(_summary(report, arguments.output_prefix))
    return 0


def _summary(report: Report, prefix: str) -> str:
    counts = report.counts
    lines = [
        f"{report.num_inputs} inputs: {counts.documents} documents, {counts.tokens:,} tokens, "
        f"{len(report.rejections)} rejected",
        "documents by source: " + ", ".join(f"{name} {number}" for name, number in sorted(counts.by_source.items())),
        "media items: " + (", ".join(f"{name} {number}" for name, number in sorted(counts.media.items())) or "none"),
        f"shards: {prefix}.*",
    ]
    lines += [f"  rejected {rejection.path}: {rejection.reason}" for rejection in report.rejections[:10]]
    if len(report.rejections) > 10:
        lines.append(f"  ... and {len(report.rejections) - 10} more in {prefix}.rejected.jsonl")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

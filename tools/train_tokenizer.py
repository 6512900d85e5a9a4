"""Learn a byte-level BPE tokenizer from the text of any files that can be preprocessed."""

import argparse
import sys
from pathlib import Path

from megatron_mm import endings
from megatron_mm.errors import ConfigError
from megatron_mm.ingest.pipeline import read_texts
from megatron_mm.printable import line
from megatron_mm.storage import make_folder, replacing
from megatron_mm.tokenizer import train_tokenizer


def main() -> int:
    parser = endings.Parser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, and folders of files")
    parser.add_argument(
        "--vocab-size", type=endings.at_least(1), required=True, metavar="N", help="ids, special tokens included"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="T", help="the tokenizer.json to write")
    arguments = parser.parse_args()
    return endings.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.output.is_dir():
        raise ConfigError(f"--output {arguments.output} is a folder: give the file to write.")
    tokenizer = train_tokenizer(read_texts(arguments.input), vocab_size=arguments.vocab_size)
    make_folder(arguments.output.parent)
    with endings.note(disk=f"--output {arguments.output}"), replacing(arguments.output) as file:
        file.write(tokenizer.to_str(pretty=True).encode())
    print(f"{line(arguments.output)}: {tokenizer.get_vocab_size()} ids")


if __name__ == "__main__":
    sys.exit(main())

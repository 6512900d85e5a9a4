"""Learn a byte-level BPE tokenizer from the text of any files that can be preprocessed."""

import argparse
import sys
from pathlib import Path

from megatron_mm.errors import DataError
from megatron_mm.ingest.pipeline import read_texts
from megatron_mm.tokenizer import train_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="files, and folders of files")
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids, special tokens included")
    parser.add_argument("--output", type=Path, required=True, metavar="T", help="the tokenizer.json to write")
    arguments = parser.parse_args()
    try:
        tokenizer = train_tokenizer(read_texts(arguments.input), vocab_size=arguments.vocab_size)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(arguments.output))
    print(f"{arguments.output}: {tokenizer.get_vocab_size()} ids")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Show what the model will see of a file, of a stored document, or of a packed sample: tokens, pixels and sound.

python tools/inspect_data.py --tokenizer tokenizer.json --input report.pdf --html report.html
python tools/inspect_data.py --tokenizer tokenizer.json --shards data/train --document 12
python tools/inspect_data.py --tokenizer tokenizer.json --shards data/train --sample 0 --seq-len 8192 --html s.html
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_mm.data.packing import plan_packing
from megatron_mm.data.show import cut_document, render_page, render_text, stored_document
from megatron_mm.errors import DataError
from megatron_mm.ingest.encode import encode_document
from megatron_mm.ingest.work import DEFAULTS, Work, read_all
from megatron_mm.shards import EncodedDocument, open_shards
from megatron_mm.tokenizer import TextTokenizer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", required=True, metavar="T", help="the tokenizer.json that the shards were made with"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", type=Path, metavar="FILE", help="a file, read and encoded now")
    what.add_argument("--shards", metavar="P", help="the prefix of shards")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="which of their documents (default 0)")
    parser.add_argument("--sample", type=int, metavar="N", help="which of their packed samples, instead of a document")
    parser.add_argument("--seq-len", type=int, default=8192, metavar="L", help="tokens of a sample (default 8192)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page that shows media, instead of printing")
    arguments = parser.parse_args()
    try:
        tokenizer = TextTokenizer(arguments.tokenizer)
        documents = list(_file(arguments.input, tokenizer) if arguments.input else _stored(arguments, tokenizer))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.html:
        arguments.html.write_text(render_page(documents, tokenizer), encoding="utf-8")
        print(f"{len(documents)} documents: {arguments.html}")
    else:
        for title, document in documents:
            print(f"{title}\n{render_text(document, tokenizer)}")
    return 0


def _file(path: Path, tokenizer: TextTokenizer) -> Iterator[tuple[str, EncodedDocument]]:
    count = 0
    for documents, rejections in read_all(Work(path), DEFAULTS):
        for rejection in rejections:
            print(f"rejected {rejection.path}: {rejection.reason}", file=sys.stderr)
        for document in documents:
            yield f"{path}, document {count}", encode_document(document, tokenizer)
            count += 1
    if not count:
        raise DataError(f"{path} gives no document")


def _stored(arguments: argparse.Namespace, tokenizer: TextTokenizer) -> Iterator[tuple[str, EncodedDocument]]:
    shards = open_shards([arguments.shards])
    if shards[0].tokenizer != tokenizer.info:
        raise DataError(f"{arguments.shards} was made with another tokenizer than {arguments.tokenizer}")
    if arguments.sample is None:
        if not 0 <= arguments.document < shards[0].num_documents:
            raise DataError(f"{arguments.shards} has {shards[0].num_documents} documents, counted from 0")
        yield f"{arguments.shards}, document {arguments.document}", stored_document(shards[0], arguments.document)
        return
    plan = plan_packing(shards, seq_len=arguments.seq_len)
    if not 0 <= arguments.sample < plan.num_samples:
        raise DataError(f"{arguments.shards} has {plan.num_samples} samples of {arguments.seq_len} tokens")
    for piece in plan.sample(arguments.sample):
        number, start, length = int(piece["document"]), int(piece["start"]), int(piece["length"])
        title = f"sample {arguments.sample}: tokens {start:,} to {start + length:,} of document {number}"
        yield title, cut_document(stored_document(shards[int(piece["shard"])], number), start, start + length)


if __name__ == "__main__":
    sys.exit(main())

"""Look after finished shards.

verify: check every byte against the checksums in the manifests. merge: make the shards of several runs one, by a
manifest that lists them; no data are copied, and the parts must stay where they are. deduplicate: copy shards without
the documents that they hold twice, exactly or nearly. show: list documents, with the file that each came from. adopt:
make an existing pair of Megatron-LM, P.bin and P.idx, shards; nothing is copied or changed.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_mm import endings
from megatron_mm.ingest.adopt import adopt
from megatron_mm.ingest.deduplicate import deduplicate
from megatron_mm.ingest.listing import list_documents, render_one, render_table
from megatron_mm.ingest.report import merge_reports
from megatron_mm.printable import line
from megatron_mm.shards import merge, open_shards
from megatron_mm.shards.writer import REPORT_SUFFIX
from megatron_mm.tokenizer import TextTokenizer

ADOPTED_SHOWN = 3
"""Documents of a pair that are shown, so that a wrong tokenizer is seen."""


def main() -> int:
    parser = endings.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser("verify", help="check every byte")
    check.add_argument("prefixes", nargs="+", metavar="P", help="prefixes of shards")
    join = actions.add_parser("merge", help="make several sets of shards one")
    join.add_argument("--output-prefix", required=True, metavar="P", help="the prefix that then names all of them")
    join.add_argument(
        "parts", nargs="+", metavar="PART", help="prefixes of shards, in their order; PART.json works too"
    )
    copy = actions.add_parser("deduplicate", help="copy shards without documents that an earlier one equals")
    copy.add_argument("prefixes", nargs="+", metavar="P", help="prefixes of shards, in their order")
    copy.add_argument("--output-prefix", required=True, metavar="P", help="where the copy goes")
    copy.add_argument(
        "--near",
        type=float,
        metavar="F",
        help="leave out texts that share this part of their runs of five tokens with an earlier one too, 0 to 1 (0.8 "
        "is usual)",
    )
    own = actions.add_parser("adopt", help="make a pair of Megatron-LM shards")
    own.add_argument("prefix", metavar="P", help="the prefix of P.bin and P.idx, beside which the rest is written")
    own.add_argument("--tokenizer", required=True, metavar="T", help="the tokenizer that the ids come from")
    own.add_argument(
        "--no-end-of-text",
        action="store_true",
        help="take documents that do not end in end-of-text: a model will not learn from them where a text ends",
    )
    show = actions.add_parser("show", help="list documents and where they came from")
    show.add_argument("prefix", metavar="P", help="a prefix of shards")
    show.add_argument("--document", type=endings.at_least(0), metavar="N", help="all that is known of one of them")
    show.add_argument(
        "--limit", type=endings.at_least(1), default=20, metavar="K", help="documents to list (default %(default)s)"
    )
    arguments = parser.parse_args()
    return endings.run(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.action == "verify":
        _verify(arguments.prefixes)
    elif arguments.action == "adopt":
        _adopt(arguments.prefix, arguments.tokenizer, end_of_text=not arguments.no_end_of_text)
    elif arguments.action == "show":
        _show(arguments.prefix, arguments.document, arguments.limit)
    elif arguments.action == "deduplicate":
        _deduplicate(arguments.prefixes, arguments.output_prefix, arguments.near)
    else:
        # A pattern of manifests finds reports too.
        parts = [part.removesuffix(".json") for part in arguments.parts if not part.endswith(REPORT_SUFFIX)]
        manifest = merge(arguments.output_prefix, parts)
        reports = merge_reports(arguments.output_prefix, parts)
        said = f"{len(parts)} parts, {reports} with a report, {manifest['documents']} documents"
        print(f"{line(arguments.output_prefix)}: {said}")


def _deduplicate(prefixes: list[str], output_prefix: str, near: float | None) -> None:
    total = sum(reader.num_documents for reader in open_shards(prefixes))
    with (
        endings.note(disk=f"--output-prefix {output_prefix}"),
        tqdm(total=total, unit="document", desc="deduplicate") as progress,
    ):
        counts = deduplicate(prefixes, output_prefix=output_prefix, threshold=near, progress=progress.update)
    listed = f"{line(output_prefix)}.rejected.jsonl"
    print(f"{total} documents: {counts.documents} stay, {counts.rejected} are listed in {listed}")


def _adopt(prefix: str, tokenizer: str, *, end_of_text: bool) -> None:
    total = sum(path.stat().st_size for path in map(Path, (f"{prefix}.bin", f"{prefix}.idx")) if path.exists())
    with (
        endings.note(disk=f"the folder of {prefix}"),
        tqdm(total=total, unit="B", unit_scale=True, desc="adopt") as progress,
    ):
        own = TextTokenizer(tokenizer)
        own.require_every_text()
        counts = adopt(prefix, own, end_of_text=end_of_text, progress=progress.update)
    print(
        f"{line(prefix)}: {counts.documents} documents, {counts.tokens:,} tokens. The first of them, by this tokenizer:"
    )
    print(render_table(list(list_documents(prefix, stop=ADOPTED_SHOWN))))


def _show(prefix: str, document: int | None, limit: int) -> None:
    if document is not None:
        for row in list_documents(prefix, start=document, stop=document + 1):
            print(render_one(row))
        return
    rows = list(list_documents(prefix, stop=limit))
    if not any(row[name] for row in rows for name in ("file", "url")):
        print("where they came from is not recorded: these shards are of an older version, or were adopted")
    print(render_table(rows) if rows else f"{line(prefix)} holds no documents")


def _verify(prefixes: list[str]) -> None:
    readers = open_shards(prefixes)
    total = sum(reader.num_bytes for reader in readers)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as progress:
        for reader in readers:
            reader.verify(progress.update)
    documents = sum(reader.num_documents for reader in readers)
    print(f"{documents} documents in {len(readers)} sets of shards: every byte is as it was written")


if __name__ == "__main__":
    sys.exit(main())

"""Look after finished shards.

verify: check every byte against the checksums in the manifests. merge: make the shards of several runs one, by a
manifest that lists them; no data are copied, and the parts must stay where they are.
"""

import argparse
import sys

from tqdm import tqdm

from megatron_mm.errors import DataError
from megatron_mm.shards import merge, open_shards


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    check = actions.add_parser("verify", help="check every byte")
    check.add_argument("prefixes", nargs="+", metavar="P", help="prefixes of shards")
    join = actions.add_parser("merge", help="make several sets of shards one")
    join.add_argument("--output-prefix", required=True, metavar="P", help="the prefix that then names all of them")
    join.add_argument(
        "parts", nargs="+", metavar="PART", help="prefixes of shards, in their order; PART.json works too"
    )
    arguments = parser.parse_args()
    try:
        if arguments.action == "verify":
            _verify(arguments.prefixes)
        else:
            parts = [part.removesuffix(".json") for part in arguments.parts]
            manifest = merge(arguments.output_prefix, parts)
            print(f"{arguments.output_prefix}: {len(parts)} parts, {manifest['documents']} documents")
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _verify(prefixes: list[str]) -> None:
    readers = open_shards(prefixes)
    total = sum(file["bytes"] for reader in readers for file in reader.manifest["files"].values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify") as progress:
        for reader in readers:
            reader.verify(progress.update)
    documents = sum(reader.num_documents for reader in readers)
    print(f"{documents} documents in {len(readers)} sets of shards: every byte is as it was written")


if __name__ == "__main__":
    sys.exit(main())

"""What a model card says of the data: shards, files, documents, tokens and licences, as the shards record them."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_mm.config import Config
from megatron_mm.errors import DataError
from megatron_mm.printable import line
from megatron_mm.shards import manifests

UNKNOWN = "not recorded"


def describe_data(config: Config) -> str:
    """Return the section of a model card on the data that the run of `config` was trained on.

    Shards that are not there when the card is written, and what older shards do not record, are said to be so.
    """
    rows, licences, missing = [], [], []
    for prefix in [prefix for name in config.data.train_datasets for prefix in name.split(",")]:
        try:
            found = [manifest for _, manifest in manifests(prefix)]
        except DataError:
            missing.append(prefix)
            continue
        rows.append(_row(prefix, found))
        licences += [one["origins"]["documents_by_licence"] for one in found if "origins" in one]
    return "\n".join(_lines(rows, licences, missing)) + "\n"


def _row(prefix: str, found: list[dict[str, Any]]) -> str:
    files = [one["origins"]["files"] for one in found if "origins" in one]
    documents, tokens = (sum(one[name] for one in found) for name in ("documents", "tokens"))
    named = f"{sum(files):,}" if len(files) == len(found) else UNKNOWN
    return f"| {_cell(prefix)} | {named} | {documents:,} | {tokens:,} |"


def _lines(rows: list[str], licences: list[Mapping[str, int]], missing: list[str]) -> Iterator[str]:
    if rows:
        yield from ("| shards | files | documents | tokens |", "|---|---|---|---|", *rows)
    if licences:
        total: dict[str, int] = {}
        for name, number in (item for one in licences for item in one.items()):
            total[name] = total.get(name, 0) + number
        ordered = sorted(total.items(), key=lambda item: (-item[1], item[0]))
        yield from ("", "| licence, as the sources give it | documents |", "|---|---|")
        yield from (f"| {_cell(name)} | {number:,} |" for name, number in ordered)
    elif rows:
        yield from ("", f"Licences of the documents: {UNKNOWN}.")
    if missing:
        names = ", ".join(map(line, missing))
        yield from ("", f"Nothing is said of {names}: the shards were not there when this card was written.")


def _cell(text: str) -> str:
    return line(text).replace("|", "\\|")

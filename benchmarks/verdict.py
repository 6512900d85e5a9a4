"""How every benchmark ends: one JSON line, and an exit status that says whether the bar holds."""

import json
from typing import NoReturn


def finish(name: str, *, ours: float, peer: float, bar: float, holds: bool | None = None) -> NoReturn:
    """Print the verdict and exit; it holds if ours / peer is at most `bar` and `holds`, if given, is true."""
    ratio = ours / peer
    verdict = ratio <= bar and holds is not False
    line = {"name": name, "ours": ours, "peer": peer, "ratio": round(ratio, 4), "bar": bar, "holds": verdict}
    print(json.dumps(line), flush=True)
    raise SystemExit(0 if verdict else 1)

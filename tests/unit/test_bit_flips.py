"""A byte that flips in any file that a run depends on is seen, or changes nothing."""

import collections
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))

import bit_flips
from bit_flips import Kind

TRIALS = 84
"""Six of each kind; benchmarks/bit_flips.py tries 500."""


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    return bit_flips.make(tmp_path_factory.mktemp("flips"))


def test_a_flipped_byte_is_seen_or_harmless(kinds: list[Kind]) -> None:
    counts = bit_flips.try_flips(kinds, trials=TRIALS, seed=1)
    assert {name: own["undetected"] for name, own in counts.items()} == dict.fromkeys(counts, 0)
    total = sum(counts.values(), collections.Counter())
    assert total["harmless"] < total["at opening"] and total["at reading"]


def test_the_trial_sees_what_nothing_checks(kinds: list[Kind], tmp_path: Path) -> None:
    path = tmp_path / "bare"
    path.write_bytes(bytes(100))
    counts = bit_flips.try_flips([Kind("bare", (path,), lambda: iter([path.read_bytes()]))], trials=3, seed=0)
    assert counts["bare"]["undetected"] == 3


def test_the_card_of_an_export_tells_how_to_check_it(kinds: list[Kind]) -> None:
    (text,) = [kind for kind in kinds if kind.name == "export text"]
    folder = text.files[0].parent
    snippet = (folder / "README.md").read_text().split("```python\n")[1].split("model = ")[0]
    code = snippet.replace("from transformers import *", "").replace("FOLDER", repr(str(folder)))
    exec(code, {})
    weights = next(path for path in text.files if path.suffix == ".safetensors")
    bit_flips.change_byte(weights, weights.stat().st_size - 1, 1)
    with pytest.raises(AssertionError, match=f"{weights.name} is damaged"):
        exec(code, {})
    bit_flips.change_byte(weights, weights.stat().st_size - 1, 1)


def test_the_code_of_a_full_export_checks_it(kinds: list[Kind]) -> None:
    from megatron_mm.hf.code.modeling_megatron_mm import MegatronMMForConditionalGeneration

    (full,) = [kind for kind in kinds if kind.name == "export full"]
    weights = next(path for path in full.files if path.suffix == ".safetensors")
    bit_flips.change_byte(weights, weights.stat().st_size - 1, 1)
    with pytest.raises(OSError, match=f"{weights.name} in .* is damaged"):
        MegatronMMForConditionalGeneration.from_pretrained(weights.parent)
    bit_flips.change_byte(weights, weights.stat().st_size - 1, 1)

"""Breaks each kernel in five ways and shows that the tests catch every one.

    python tests/kernels/mutate.py [TEST ...]

All mutants are compiled into one program, which runs the one that MEGATRON_MM_MUTANT names; for each, the tests of its
kernel must fail, and with none they must pass. Prints a table; exits 0 only if every mutant is caught.
With names of tests (mqa_rope, ...) only their mutants run.
"""

import contextlib
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc" / "kernels"

# (file, test, what is broken, which occurrence of the code, the code, the broken code); both are expressions.
MUTANTS = [
    ("swiglu", "swiglu", "off by one", 0, "column >= columns", "column > columns"),
    ("swiglu", "swiglu", "swapped index", 0, "(2 * row + 1) * columns", "2 * row * columns"),
    ("swiglu", "swiglu", "swapped operand", 0, "gradient[i] * up[i]", "gradient[i] * gate[i]"),
    ("swiglu", "swiglu", "swapped index", 2, "(2 * row + 1) * columns", "2 * row * columns"),
    ("swiglu", "swiglu", "lost term", 0, "1.0f - sigmoid", "1.0f"),
    ("device", "rms_norm", "dropped barrier", 0, "__syncthreads()", "(void)0"),
    ("device", "rms_norm", "dropped barrier", 1, "__syncthreads()", "(void)0"),
    (
        *("rms_norm", "rms_norm", "stale accumulator", 0),
        *("grad_weight[k][i] += gradient[k][i] * direction", "grad_weight[k][i] = gradient[k][i] * direction"),
    ),
    ("rms_norm", "rms_norm", "swapped index", 0, "inverse * scale[i]", "inverse * scale[0]"),
    ("rms_norm", "rms_norm", "off by one", 0, "block_sum(squares) / columns", "block_sum(squares) / (columns - 1)"),
    (
        *("mqa_rope", "mqa_rope", "wrong mask", 0),
        *("__shfl_xor_sync(kAllLanes, value, distance)", "__shfl_xor_sync(0x00ffffffu, value, distance)"),
    ),
    ("mqa_rope", "mqa_rope", "swapped index", 0, "2 * group + is_value", "2 * group + !is_value"),
    ("mqa_rope", "mqa_rope", "off by one", 0, "token < tokens", "token <= tokens"),
    (
        *("mqa_rope", "mqa_rope", "wrong sign", 1),
        *("gy[i] * cos[i] - gx[i] * sin[i]", "gy[i] * cos[i] + gx[i] * sin[i]"),
    ),
    (
        *("mqa_rope", "mqa_rope", "stale accumulator", 0),
        "grad_weight[0][step][0][i] += head.is_query ? dx * direction_x : 0.0f",
        "grad_weight[0][step][0][i] = head.is_query ? dx * direction_x : 0.0f",
    ),
    ("cross_entropy", "cross_entropy", "dropped barrier", 0, "__syncthreads()", "(void)0"),
    ("cross_entropy", "cross_entropy", "off by one", 0, "label < columns", "label <= columns"),
    ("cross_entropy", "cross_entropy", "stale accumulator", 0, "sum * expf(maximum - highest)", "sum"),
    ("cross_entropy", "cross_entropy", "wrong mask", 1, "mask[row] == 0.0f", "mask[row] != 0.0f"),
    ("cross_entropy", "cross_entropy", "swapped index", 0, "own[2 * rows]", "own[rows]"),
    ("assemble_embeddings", "assemble", "off by one", 0, "media >= 0", "media > 0"),
    (
        *("assemble_embeddings", "assemble", "swapped index", 0),
        *("grad_features + media * columns", "grad_features + row * columns"),
    ),
    (
        *("assemble_embeddings", "assemble", "stale accumulator", 0),
        *("type.value[i] += group[i]", "type.value[i] = group[i]"),
    ),
    ("assemble_embeddings", "assemble", "off by one", 0, "row < rows", "row <= rows"),
    ("assemble_embeddings", "assemble", "swapped index", 0, "group[i] + type[i]", "group[i] + type[0]"),
    ("token_rows", "token_rows", "off by one", 0, "id < vocab", "id <= vocab"),
    ("token_rows", "token_rows", "lost carry", 0, "ends || place + 1 == stop", "ends"),
    ("token_rows", "token_rows", "swapped index", 0, "order[place]", "place"),
    ("token_rows", "token_rows", "off by one", 0, "tile < gridDim.x", "tile + 1 < gridDim.x"),
    ("token_rows", "token_rows", "stale flag", 0, "from_before = false", "from_before"),
]


def break_sources(folder: Path) -> None:
    """Copy csrc/kernels into `folder`, with every mutant in it, each run only if it is chosen."""
    shutil.copytree(CSRC, folder, dirs_exist_ok=True)
    places = []
    for number, (file, _, _, occurrence, code, broken) in enumerate(MUTANTS, start=1):
        path = folder / f"{file}.cuh"
        start = -1
        for _ in range(occurrence + 1):
            start = path.read_text().index(code, start + 1)
        places.append((path, start, code, f"(simt::mutant == {number} ? ({broken}) : ({code}))"))
    for path, start, code, choice in sorted(places, key=lambda place: -place[1]):  # from the end: places stay right
        text = path.read_text()
        path.write_text(text[:start] + choice + text[start + len(code) :])


def is_caught(number: int, test: str) -> bool:
    """Return whether a test of `test` fails with mutant `number`; 0 is none."""
    import pytest

    os.environ["MEGATRON_MM_MUTANT"] = str(number)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main(["-x", "-q", "-k", f"test_{test} and native-", str(HERE)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"the tests could not run:\n{output.getvalue()}")
    return status == pytest.ExitCode.TESTS_FAILED


def main() -> None:
    """Run every mutant."""
    with tempfile.TemporaryDirectory() as folder:
        break_sources(Path(folder))
        os.environ["MEGATRON_MM_CSRC"] = folder
        tests = sys.argv[1:] or sorted({mutant[1] for mutant in MUTANTS})
        for test in tests:
            if is_caught(0, test):
                sys.exit(f"{test}: the tests fail with no mutant")
        caught = []
        for number, (_, test, kind, _, code, broken) in enumerate(MUTANTS, start=1):
            if test not in tests:
                continue
            caught.append(is_caught(number, test))
            print(f"{test:14} {kind:18} {'caught' if caught[-1] else 'MISSED':7} {code} -> {broken}", flush=True)
    print(f"{sum(caught)} of {len(caught)} mutants caught")
    sys.exit(0 if all(caught) else 1)


if __name__ == "__main__":
    main()

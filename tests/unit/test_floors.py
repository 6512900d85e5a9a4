"""Imports go down the floors only, and each heavy or private thing is touched in one place."""

import ast
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_mm

ROOT = Path(megatron_mm.__file__).parent
FLOORS = {
    **dict.fromkeys(("errors", "endings", "environment", "noise", "outside", "printable", "retry"), 0),
    **dict.fromkeys(("sentencepiece_model", "settings", "source", "spelling", "storage"), 0),
    **dict.fromkeys(("modalities", "optimizers"), 1),
    **dict.fromkeys(("config", "kernels", "tokenizer", "shards", "batch"), 2),
    **dict.fromkeys(("engine", "ingest"), 2),
    **dict.fromkeys(("data", "model"), 3),
    "checkpoint": 4,
    **dict.fromkeys(("training", "hf"), 5),
    **dict.fromkeys(("planning", "train"), 6),
}
APART = {"ingest", "data", "model"}
"""These meet at shards.py and batch.py, and never import one another."""
REPLACED_FROM = ("torch", "megatron")
"""Packages whose names one file alone may replace."""


PARTS_OF_A_MODALITY = {"ingest": {"spec"}, "data": {"spec", "decode"}, "model": {"spec", "encoder"}}
"""What may be imported of modalities/X, or asked of it by `part`; what stands above them may all but decode."""
ABOVE = {"spec", "encoder", "hf", "exported"}
KNOWS_A_MODALITY = ("ingest/audio.py", "ingest/video.py")
"""Readers of files of a kind: elsewhere no modality is imported by its name."""
IN_A_MODALITY = re.compile(r"megatron_mm\.modalities\.(?:image|audio)\.(\w+)")

IN_A_PARTIAL_FOLDER = "in a folder that publish_folder brings to the disk before it has its name"
WRITES_BY_ITSELF = {
    "megatron_mm/storage.py": "what everything else is committed by",
    "megatron_mm/checkpoint/copies.py": "into memory, which no power cut outlives",
    "megatron_mm/checkpoint/format.py": IN_A_PARTIAL_FOLDER,
    "megatron_mm/checkpoint/nodes.py": "into memory",
    "megatron_mm/checkpoint/save.py": IN_A_PARTIAL_FOLDER,
    "megatron_mm/checkpoint/shares.py": "into memory",
    "megatron_mm/checkpoint/write.py": IN_A_PARTIAL_FOLDER,
    "megatron_mm/hf/export.py": IN_A_PARTIAL_FOLDER,
    "megatron_mm/hf/files.py": IN_A_PARTIAL_FOLDER,
    "megatron_mm/shards/writer.py": "parts that are synced before give_name, and a journal that is appended to",
    "megatron_mm/training/metrics.py": "lines that are appended",
    "megatron_mm/training/report.py": "into a file that replacing has opened",
    "megatron_mm/endings.py": "how a rank has ended, for the script of this one try",
    "megatron_mm/environment.py": "a cache of compiled code",
    "megatron_mm/training/watch.py": "hang.txt, for people",
    "megatron_mm/planning/pictures.py": "pictures, for people",
    "megatron_mm/ingest/archive.py": "unpacked into a temporary folder",
    "megatron_mm/ingest/mail.py": "unpacked into a temporary folder",
    "megatron_mm/ingest/mailbox.py": "a message in a temporary folder",
    "megatron_mm/ingest/warc.py": "unpacked into a temporary folder",
    "megatron_mm/modalities/audio/spec.py": "into memory",
    "tools/inspect_data.py": "a page, for people",
    "tools/plan.py": "a page, for people",
    "tools/rehearse.py": "a page, and figures, for people",
}
"""Files that write, rename or make folders that storage.py does not bring to the disk, and why that is no harm."""
WRITES = {"write_text", "write_bytes", "savefig", "tofile", "rename", "renames", "link", "symlink", "mkdir", "makedirs"}
WRITES |= {"symlink_to", "hardlink_to", "copy", "copy2", "copyfile", "copytree", "move", "save_file"}


def imports() -> Iterator[tuple[Path, str]]:
    """Yield (file, imported module) of every import in the package, those inside functions included.

    The files that exports carry run in transformers, which imports them as a package of their own.
    """
    for path in ROOT.rglob("*.py"):
        if path.parent == ROOT / "hf" / "code":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                if not all(is_file(name) for name in names):  # else nothing of the package's own __init__ is taken
                    yield path, node.module
                yield from ((path, name) for name in names)


def is_file(dotted: str) -> bool:
    """Tell whether a module is a file or folder of the package."""
    path = ROOT.parent / dotted.replace(".", "/")
    return dotted.startswith("megatron_mm.") and (path.is_dir() or path.with_suffix(".py").is_file())


def room(dotted: str) -> str | None:
    """Return the part of the package that a file or module belongs to."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "megatron_mm" and len(parts) > 1 and parts[1] in FLOORS else None


def test_every_file_stands_on_a_floor() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert rooms - {"__init__"} == set(FLOORS)


def test_imports_go_down() -> None:
    for path, module in imports():
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        other = room(module)
        if own == "__init__" or other is None or other == own:
            continue
        assert FLOORS[other] <= FLOORS[own], f"{path.relative_to(ROOT)} imports {module}, which stands above it"
        assert not {own, other} <= APART, f"{path.relative_to(ROOT)} imports {module}: they meet at the borders only"


def parts_of_modalities() -> Iterator[tuple[Path, str]]:
    """Yield (file, part) of each import of modalities/X/part, and each `part("...")`, outside modalities."""
    for path, module in imports():
        if found := IN_A_MODALITY.match(module):
            yield path.relative_to(ROOT), found[1]
    for path in ROOT.rglob("*.py"):
        yield from ((path.relative_to(ROOT), part) for part in re.findall(r'\.part\("(\w+)"\)', path.read_text()))


def test_each_floor_imports_its_own_part_of_a_modality() -> None:
    seen = set()
    for path, part in parts_of_modalities():
        own = path.parts[0]
        seen.add((own, part))
        if own != "modalities":
            assert part in PARTS_OF_A_MODALITY.get(own, ABOVE), f"{path} uses {part} of a modality"
    assert {("ingest", "spec"), ("data", "decode"), ("model", "encoder")} <= seen


def test_a_spec_imports_no_torch() -> None:
    code = "import sys, megatron_mm.modalities, megatron_mm.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_modalities_are_named_in_their_folders_alone() -> None:
    named = {str(path.relative_to(ROOT)) for path, module in imports() if IN_A_MODALITY.match(module)}
    assert {name for name in named if not name.startswith("modalities/")} == set(KNOWS_A_MODALITY)


def file_of(path: Path) -> str:
    """Return the name of a file inside the package, dotted."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def cycles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the largest sets of nodes that all reach one another."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found, left = set(), [start]
        while left:
            for node in graph.get(left.pop(), set()) - found:
                found.add(node)
                left.append(node)
        reached[start] = found
    knots = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return sorted((set(knot) for knot in knots if len(knot) > 1), key=sorted)


def test_no_file_imports_itself_through_another() -> None:
    files = {file_of(path) for path in ROOT.rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in files}
    for path, module in imports():
        own, other = file_of(path), module.removeprefix("megatron_mm.")
        if module.startswith("megatron_mm.") and other in files and other != own:
            graph[own].add(other)
    assert not cycles(graph)


def test_no_part_imports_itself_through_another() -> None:
    graph: dict[str, set[str]] = {name: set() for name in FLOORS}
    for path, module in imports():
        own, other = path.relative_to(ROOT).parts[0].removesuffix(".py"), room(module)
        if own in graph and other is not None and other != own:
            graph[own].add(other)
    assert not cycles(graph)


def root_of(node: ast.expr) -> str | None:
    """Return the name that a chain of attributes begins with, None of anything else."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def replaced_names(tree: ast.Module) -> Iterator[str]:
    """Yield what is assigned to attributes of modules, classes and functions of torch and megatron-core."""
    theirs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            theirs |= {
                alias.asname or alias.name.split(".")[0]
                for alias in node.names
                if alias.name.split(".")[0] in REPLACED_FROM
            }
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in REPLACED_FROM:
            theirs |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Delete):
            targets = node.targets if isinstance(node, ast.Assign | ast.Delete) else [node.target]
            names = [inner for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Attribute)]
            yield from (ast.unparse(name) for name in names if root_of(name) in theirs)
        elif isinstance(node, ast.Call) and node.args and root_of(node.args[0]) in theirs:
            called = ast.unparse(node.func)
            if called in ("setattr", "delattr") or called.endswith("patch.object"):
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mock.patch"):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.cuda.synchronize = None",
        "import torch.distributed as dist\ndist.barrier, other = None, 1",
        "from torch import Tensor\nsetattr(Tensor, 'cuda', None)",
        "from megatron.core.tensor_parallel import layers\nlayers._flag = True",
        "from torch import nn\nfrom unittest import mock\nmock.patch.object(nn.Module, '_apply', None)",
        "from unittest import mock\nmock.patch('torch.zeros')",
        "import torch\ndel torch.zeros",
    ],
)
def test_a_replaced_name_is_seen(code: str) -> None:
    assert list(replaced_names(ast.parse(code)))


def test_the_patches_alone_replace_names_of_torch_and_megatron_core() -> None:
    for path in ROOT.rglob("*.py"):
        found = list(replaced_names(ast.parse(path.read_text())))
        assert not found, f"{path.relative_to(ROOT)} replaces {found}: engine/patches.py alone does that"


def test_the_mesh_alone_reads_parallel_state() -> None:
    readers = {path.relative_to(ROOT) for path, module in imports() if "parallel_state" in module}
    assert readers == {Path("engine/mesh.py")}


def test_the_device_alone_asks_for_a_gpu() -> None:
    askers = {path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "cuda.is_available" in path.read_text()}
    assert askers == {Path("engine/device.py")}


def writes(path: Path) -> Iterator[str]:
    """Yield each call in a file that writes, names or makes something on a disk."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        owner, _, name = function.rpartition(".")
        words = [value.value for value in ast.walk(node) if isinstance(value, ast.Constant)]
        modes = [word for word in words if isinstance(word, str) and re.fullmatch(r"[rwxab+]*[wxa+][rwxab+]*", word)]
        replaces = name == "replace" and (owner == "os" or (len(node.args) == 1 and not node.keywords))
        on_a_disk = owner in ("os", "shutil") or name not in ("copy", "move", "rename", "link")
        if replaces or (name in ("open", "NamedTemporaryFile") and modes) or (name in WRITES and on_a_disk):
            yield f"line {node.lineno}: {function}"


def test_nothing_is_committed_but_through_storage() -> None:
    places = [path for part in ("megatron_mm", "tools") for path in sorted((ROOT.parent / part).rglob("*.py"))]
    found = {str(path.relative_to(ROOT.parent)): list(writes(path)) for path in places}
    found = {name: lines for name, lines in found.items() if lines}
    assert found.keys() == WRITES_BY_ITSELF.keys(), {
        name: lines for name, lines in found.items() if name not in WRITES_BY_ITSELF
    }


def test_a_write_past_storage_is_found(tmp_path: Path) -> None:
    calls = """
        path.write_text(""), path.open("wb"), open(path, "a"), open(path, mode="x"), os.rename(a, b), os.replace(a, b)
        a.replace(b), a.mkdir(), shutil.move(a, b), shutil.copy(a, b), figure.savefig(path), os.link(a, b)
        text.replace("a", "b"), path.open(), open(path, "rb"), replace(config, x=1), values.copy(), text.write(b"")
    """
    (tmp_path / "file.py").write_text(textwrap.dedent(calls))
    assert len(list(writes(tmp_path / "file.py"))) == 12


def test_there_is_no_room_without_a_name() -> None:
    assert not [path for path in ROOT.rglob("*.py") if path.stem in ("utils", "common", "helpers", "misc")]

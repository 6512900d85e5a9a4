"""A copy of the package with a researcher's files in it: what the recipes of docs/extending.md say, done for real."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLES = Path(__file__).parent
SECONDS = 600


@dataclass(frozen=True)
class House:
    """A copy of the package, in a folder of its own."""

    folder: Path

    @staticmethod
    def build(folder: Path) -> "House":
        """Return a copy of this package in `folder`."""
        shutil.copytree(ROOT / "megatron_mm", folder / "megatron_mm", ignore=shutil.ignore_patterns("__pycache__"))
        return House(folder)

    def add(self, source: str, place: str) -> None:
        """Copy a file or a folder of the examples to `place` in the package."""
        target = self.folder / "megatron_mm" / place
        copy = shutil.copytree if (EXAMPLES / source).is_dir() else shutil.copyfile
        copy(EXAMPLES / source, target)

    def change(self, file: str, before: str, after: str) -> None:
        """Replace one line of a file of the package."""
        path = self.folder / "megatron_mm" / file
        text = path.read_text()
        assert text.count(before) == 1, f"{file}: {before!r} is there {text.count(before)} times"
        path.write_text(text.replace(before, after))

    def run(self, *command: str, ranks: int = 1, fails: bool = False) -> str:
        """Run `python COMMAND` over this package, with torchrun over several ranks; return what it prints."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environment = os.environ | {"PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        whole = [sys.executable, *launcher, *command]
        ended = subprocess.run(whole, capture_output=True, text=True, timeout=SECONDS, env=environment, cwd=self.folder)
        assert bool(ended.returncode) == fails, f"{' '.join(whole)}\n{ended.stdout[-2000:]}\n{ended.stderr[-6000:]}"
        return ended.stdout + ended.stderr

    def train(self, *overrides: str, ranks: int = 1) -> str:
        """Train the preset tiny."""
        return self.run("-m", "megatron_mm.train", "tiny", *overrides, ranks=ranks)

    def tool(self, name: str, *arguments: str) -> str:
        """Run one of the tools."""
        return self.run(str(ROOT / "tools" / f"{name}.py"), *arguments)

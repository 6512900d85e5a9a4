"""The CPU in place of CUDA: what is replaced for it, and what importing the package leaves alone."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from launch import run_alone

from megatron_mm.engine import patches
from megatron_mm.engine.patches import PATCHES, When


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: what is replaced stays for the life of a process."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def names_now() -> dict[str, object]:
    """Return every name in the modules of torch and megatron-core that are loaded, and in their classes."""
    found: dict[str, object] = {}
    for module_name, module in list(sys.modules.items()):
        if module is None or module_name.split(".")[0] not in ("torch", "megatron"):
            continue
        for name, value in list(vars(module).items()):
            found[f"{module_name}.{name}"] = value
            if isinstance(value, type) and value.__module__.split(".")[0] in ("torch", "megatron"):
                found |= {f"{value.__module__}.{value.__qualname__}.{key}": own for key, own in vars(value).items()}
    return found


def changed_since(before: dict[str, object]) -> set[str]:
    """Return the names that are something else now; modules that were loaded since are no change."""
    return {
        name
        for name, value in names_now().items()
        if before.get(name) is not value and not isinstance(value, type(sys))
    }


def replaced(*, only: When | None = None) -> dict[str, set[str]]:
    """Return, by what asks for it, the names that are something else then."""
    import megatron_mm.planning.rehearsal
    import megatron_mm.training.loop  # noqa: F401
    from megatron_mm.checkpoint.index import IndexUnpickler
    from megatron_mm.engine import device

    before, found = names_now(), {}
    device.prepare()
    found["prepare"] = changed_since(before)
    device.prepare()
    device.use_meta()
    found["anew"] = changed_since(before)
    lasting = changed_since(before)
    with patches.for_rehearsal():
        found["rehearsal"] = changed_since(before) - lasting
    with patches.for_save(lambda: None):
        found["saving"] = changed_since(before) - lasting
    with patches.only_plain_data("unused", IndexUnpickler):
        found["loading"] = changed_since(before) - lasting
    found["after"] = changed_since(before) - lasting
    return found


def table(*whens: When) -> set[str]:
    names = {name for patch in PATCHES if patch.when in whens for name in patch.replaces}
    for exported, defined in DEFINED_IN.items():
        names = {name.replace(exported, defined) for name in names}
    return names


DEFINED_IN = {
    "checkpoint.DefaultLoadPlanner": "checkpoint.default_planner.DefaultLoadPlanner",
    "torch.nn.Module": "torch.nn.modules.module.Module",
}
"""Classes of the table, and their full names."""


def test_what_is_replaced_is_what_the_table_lists() -> None:
    found = run_alone(replaced)
    at_start = table(When.ALWAYS, When.CPU, When.NO_CURRENT_GPU, When.NO_APEX)
    assert found["prepare"] == at_start, found["prepare"] ^ at_start
    assert found["anew"] == at_start
    assert found["rehearsal"] == table(When.REHEARSAL), found["rehearsal"]
    assert found["saving"] == table(When.SAVING), found["saving"]
    assert found["loading"] == table(When.LOADING), found["loading"]
    assert not found["after"]


def places_of_both_orders(meta_first: bool) -> tuple[str, str]:
    from megatron_mm.engine import device

    for take in (device.use_meta, device.prepare)[:: 1 if meta_first else -1]:
        take()
    return str(torch.cuda.current_device()), str(torch.zeros(1, device="cuda").device)


@pytest.mark.parametrize("meta_first", [True, False])
def test_the_order_of_calls_does_not_matter(meta_first: bool) -> None:
    assert run_alone(places_of_both_orders, meta_first) == ("meta", "cpu")


def test_another_megatron_core_is_refused() -> None:
    result = python(
        """
        from megatron_mm.engine import device, patches
        patches.version = lambda name: "0.20.0"
        device.prepare()
        """
    )
    assert (
        "megatron-core 0.20.0 is installed; what is replaced in it was traced in megatron-core 0.19.2" in result.stderr
    )


def with_a_gpu() -> list[str]:
    from megatron_mm.engine import device

    patches.install(device.current, gpu=True)
    return sorted(patches._installed)


def test_a_gpu_is_not_hidden() -> None:
    assert set(run_alone(with_a_gpu)) == table(When.ALWAYS, When.NO_APEX)


@pytest.fixture
def path_with_engine(tmp_path: Path) -> str:
    """A PYTHONPATH on which there is a package of TransformerEngine's name."""
    return path_with("transformer_engine", tmp_path)


def path_with(name: str, folder: Path) -> str:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def test_a_command_keeps_accelerators_out(path_with_engine: str) -> None:
    result = python(
        """
        from megatron_mm.engine import device
        device.keep_out_accelerators()
        import megatron_mm.training.loop  # imports megatron-core
        device.prepare()
        import megatron.core.extensions.transformer_engine as extension
        assert not extension.HAVE_TE
        """,
        PYTHONPATH=path_with_engine,
    )
    assert result.returncode == 0, result.stderr


def test_importing_the_package_keeps_nothing_out(tmp_path: Path) -> None:
    result = python(
        """
        import sys
        import megatron_mm.train, megatron_mm.training.loop, megatron_mm.planning.rehearsal, megatron_mm.hf.generate
        assert not [name for name, module in sys.modules.items() if module is None and "." not in name]
        from megatron_mm.engine import patches
        assert not patches._installed
        import flash_attn
        """,
        PYTHONPATH=path_with("flash_attn", tmp_path),  # megatron-core does not take an empty TransformerEngine
    )
    assert result.returncode == 0, result.stderr


def test_a_cpu_does_not_stand_in_beside_an_accelerator(path_with_engine: str) -> None:
    result = python(
        """
        import transformer_engine
        from megatron_mm.engine import device
        device.prepare()
        """,
        PYTHONPATH=path_with_engine,
    )
    assert "transformer_engine was imported, and there is no GPU" in result.stderr
    assert "device.keep_out_accelerators() before megatron-core is imported" in result.stderr


def test_megatron_core_may_be_imported_first() -> None:
    result = python(
        """
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron_mm import config
        from megatron_mm.engine import mesh
        assert mesh.initialize(config.load("tiny")).describe() == "TP1 PP1 DP1"
        """
    )
    assert result.returncode == 0, result.stderr

"""The CPU stand-ins: exactly what is listed is replaced, and only where it may be."""

import subprocess
import sys
import textwrap


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: the stand-ins stay for the life of a process."""
    import os

    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_install_replaces_what_it_lists_and_nothing_else() -> None:
    result = python(
        """
        import torch, torch.cuda.random

        places = {"torch": torch, "torch.cuda": torch.cuda, "torch.cuda.random": torch.cuda.random}
        places["torch.Tensor"] = torch.Tensor
        before = {name: dict(vars(place)) for name, place in places.items()}
        from megatron_mm.engine import device
        device.install()
        changed = {
            f"{name}.{key}" for name, place in places.items() for key, value in vars(place).items()
            if before[name].get(key) is not value and not isinstance(value, type(torch))
        }
        # Attributes of the C tensor type are found on the class only once they are replaced.
        assert changed == set(device.REPLACED), changed ^ set(device.REPLACED)
        device.install()
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.ones(2, pin_memory=True).sum() == 2
        assert torch.zeros(1).type() == "torch.FloatTensor"
        """
    )
    assert result.returncode == 0, result.stderr


def test_another_megatron_core_is_refused() -> None:
    result = python(
        """
        from megatron_mm.engine import device
        device.version = lambda name: "0.20.0"
        device.install()
        """
    )
    assert "megatron-core 0.20.0 is installed; the CPU stand-ins were made for 0.19.2" in result.stderr


def test_a_gpu_is_not_hidden() -> None:
    result = python(
        """
        from megatron_mm.engine import device
        device.has_gpu = lambda: True
        device.install()
        """
    )
    assert "a GPU is present" in result.stderr


def test_accelerators_that_need_cuda_are_kept_out(tmp_path) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('it would call CUDA')")
    result = python(
        """
        import megatron_mm.training.loop  # imports megatron-core before a run prepares its device
        from megatron_mm.engine import device
        device.prepare()
        import megatron.core.extensions.transformer_engine as extension
        assert not extension.HAVE_TE
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    (package / "__init__.py").write_text("")
    result = python(
        """
        import transformer_engine
        from megatron_mm.engine import device
        device.install()
        """,
        PYTHONPATH=str(tmp_path),
    )
    assert "transformer_engine was imported, and there is no GPU" in result.stderr


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

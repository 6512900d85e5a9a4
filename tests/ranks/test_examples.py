"""The scripts under examples/ do what they say."""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from megatron_mm.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def test_the_demo_trains_stops_and_goes_on_in_another_layout(tmp_path: Path) -> None:
    environment = {**os.environ, "DEMO_STEPS": "4", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = [str(ROOT / "examples" / "demo.sh"), str(tmp_path / "run")]
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=1_500)
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stdout + ended.stderr
    report = ended.stdout[ended.stdout.index("model  ") :]
    assert "TP2 PP2 DP1, steps 0 to 2" in report
    assert "TP1 PP2 DP2, steps 2 to 4" in report
    assert all(f"  {source} " in report for source in ("text", "image", "audio", "pdf"))
    assert "InternVLForConditionalGeneration | purple-daisies.jpg |" in ended.stdout
    assert "LlamaForCausalLM | 'It was" in ended.stdout
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if "grad_norm" in record] == [1, 2, 3, 4]
    with Image.open(tmp_path / "run" / "loss.png") as picture:
        assert picture.width > 600

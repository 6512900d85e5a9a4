"""Load the exports of a model with whatever transformers is installed, and keep or compare what they compute.

  python benchmarks/load_exports.py EXPORTS --save logits.pt                   # here: transformers 5
  OLD_ENVIRONMENT/bin/python benchmarks/load_exports.py EXPORTS --compare logits.pt

Imports nothing of this package. Fails at a key that is missing, unexpected or of another shape, at a rotary base that
is not the export's, and at logits in FP32 that are 1e-4 apart.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

AUTO = {"text": AutoModelForCausalLM, "image": AutoModelForImageTextToText, "full": AutoModelForCausalLM}


def inputs_of(kind: str, folder: Path) -> dict[str, Tensor]:
    """Return the same inputs at every call: text, behind an image and a sound where an export takes them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=kind == "full")
    config = json.loads((folder / "config.json").read_text())
    text = tokenizer("the tall bird sees a house under the hill")["input_ids"]
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    if kind != "text":
        text = [config["image_token_id"]] * config["image_seq_length"] + text
        inputs["pixel_values"] = torch.rand(1, 3, 224, 224, generator=generator) * 2 - 1
    if kind == "full":
        text = [config["audio_token_id"]] * 49 + text
        inputs["input_values"] = torch.randn(1, 16_000, generator=generator)
        inputs["input_values_mask"] = torch.ones(1, 16_000, dtype=torch.bool)
    ids = torch.tensor([text])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | inputs


def main() -> None:
    """Load each export, and print a line about it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", type=Path)
    parser.add_argument("--save", type=Path, help="write the logits")
    parser.add_argument("--compare", type=Path, help="logits of another version")
    options = parser.parse_args()
    expected = torch.load(options.compare) if options.compare else {}
    computed = {}
    for kind, auto in AUTO.items():
        folder = options.exports / kind
        loading = {"output_loading_info": True, "trust_remote_code": kind == "full", "torch_dtype": torch.float32}
        model, info = auto.from_pretrained(folder, **loading)
        wrong = {name: keys for name, keys in info.items() if keys}
        assert not wrong, f"{kind}: {wrong}"
        with torch.no_grad():
            computed[kind] = model.eval()(**inputs_of(kind, folder)).logits
        far = (computed[kind] - expected[kind]).abs().max().item() if expected else 0.0
        assert far < 1e-4, f"{kind}: logits are {far} apart"
        apart = f" | logits {far:.1e} apart" if expected else ""
        print(f"transformers {transformers.__version__} | {kind}: {type(model).__name__}, every key in place{apart}")
    if options.save:
        torch.save(computed, options.save)


if __name__ == "__main__":
    main()

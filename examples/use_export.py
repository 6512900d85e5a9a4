"""Load exports with stock transformers: caption an image, continue a text. Nothing of megatron_mm is imported.

What is loaded is compared first with the sha256 of every file that the export lists, its card apart.

python examples/use_export.py EXPORTS IMAGE [TEXT]
"""

import hashlib
import json
import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

CAPTION = "A photograph of"
exports, image = Path(sys.argv[1]), Path(sys.argv[2])
text = sys.argv[3] if len(sys.argv) > 3 else "It was"


def check(folder: Path) -> None:
    """Raise OSError if a file of an export is not what was written."""
    sums = json.loads((folder / "conversion_manifest.json").read_text())["sha256"]
    sums.pop("README.md", None)  # whoever publishes an export adds to its card
    for name, expected in sums.items():
        with open(folder / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                raise OSError(f"{folder / name} is damaged: copy the export again")


check(exports / "image"), check(exports / "text")
processor = AutoProcessor.from_pretrained(exports / "image")
model = AutoModelForImageTextToText.from_pretrained(exports / "image")
inputs = processor(images=[Image.open(image).convert("RGB")], text=[f"<|image|>{CAPTION}"], return_tensors="pt")
caption = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
caption = CAPTION + processor.tokenizer.decode(caption, skip_special_tokens=True)
print(f"{type(model).__name__} | {image.name} | {caption!r}")

tokenizer = AutoTokenizer.from_pretrained(exports / "text")
model = AutoModelForCausalLM.from_pretrained(exports / "text")
inputs = tokenizer(text, return_tensors="pt")
continued = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
print(f"{type(model).__name__} | {tokenizer.decode(continued, skip_special_tokens=True)!r}")

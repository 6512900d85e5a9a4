"""ViT-L/16 and Wav2Vec2-Large at full size: the libraries' features, and ours after reading the file that they wrote.

  python benchmarks/encoders.py [--folder build/encoders]

timm and Hugging Face write a ViT-L/16, torchaudio and Hugging Face a Wav2Vec2-Large in both forms, of random weights
with every norm and bias stirred. Each file is read as image.pretrained or audio.pretrained are. The bar: the largest
difference of a feature is below 1e-5 of the features' standard deviation. Needs 1.3 GB free and 5 GB of memory.
"""

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchaudio
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel, Wav2Vec2Config, Wav2Vec2Model
from verdict import finish

from megatron_mm import config as configs
from megatron_mm.modalities.audio.encoder import Encoder as AudioEncoder
from megatron_mm.modalities.image.encoder import Encoder as ImageEncoder
from megatron_mm.modalities.pretrained import load_tower

ROOT = Path(__file__).parents[1]
BAR = 1e-5
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LAYER_NORM = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}


def stirred(module: nn.Module) -> nn.Module:
    """Give norms and biases, which start as ones and zeros, values of their own."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 1:
                parameter += 0.02 * torch.randn_like(parameter)
    return module.eval()


def vision(theirs: nn.Module, save: Callable[[], Path], features: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of a feature behind the final norm, in standard deviations."""
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    ours = ImageEncoder(configs.load("mm_88b").image).eval()
    load_tower(ours.tower, ours.family, save(), name="image")
    assert sum(p.numel() for p in ours.tower.parameters()) == 303_301_632
    with torch.no_grad():
        found = ours.tower.layernorm(ours(tuple(images))).view(2, 196, -1)
        expected = features(images.float() / 127.5 - 1.0)[:, 1:]
    return ((found - expected).abs().max() / expected.std()).item()


def audio(form: str, save: Callable[[], Path], features: Callable[[Tensor], Tensor]) -> float:
    """Return the largest difference of a feature of a second of noise, in standard deviations."""
    sound = torch.randn(16_000)
    ours = AudioEncoder(configs.load("mm_88b").audio.model_copy(update={"form": form})).eval()
    load_tower(ours.tower, ours.family, save(), name="audio")
    with torch.no_grad():
        found, expected = ours((sound,)), features(sound.unsqueeze(0))[0]
    return ((found - expected).abs().max() / expected.std()).item()


def saved(module: nn.Module, path: Path) -> Path:
    """Write a file as the library's users keep it, and return its path."""
    if isinstance(module, ViTModel | Wav2Vec2Model):
        module.save_pretrained(path)
    else:
        torch.save(module.state_dict(), path)
    return path


def cases(folder: Path) -> dict[str, Callable[[], float]]:
    """Return what to compare, by name."""

    def timm_vit() -> float:
        theirs = stirred(timm.create_model("vit_large_patch16_224"))
        return vision(theirs, lambda: saved(theirs, folder / "vit.pth"), theirs.forward_features)

    def hugging_face_vit() -> float:
        theirs = stirred(ViTModel(ViTConfig(**LARGE, layer_norm_eps=1e-6)))
        return vision(theirs, lambda: saved(theirs, folder / "vit"), lambda x: theirs(x).last_hidden_state)

    def torchaudio_large(form: str) -> float:
        build = "wav2vec2_large_lv60k" if form == "lv60k" else "wav2vec2_large"
        theirs = stirred(getattr(torchaudio.models, build)())
        return audio(form, lambda: saved(theirs, folder / "sound.pth"), lambda x: theirs(x)[0])

    def hugging_face_large(form: str) -> float:
        theirs = stirred(Wav2Vec2Model(Wav2Vec2Config(**LARGE, **(LAYER_NORM if form == "lv60k" else {}))))
        return audio(form, lambda: saved(theirs, folder / "sound"), lambda x: theirs(x).last_hidden_state)

    forms = ("ls960", "lv60k")
    sound = {f"torchaudio Wav2Vec2-Large {form}": lambda form=form: torchaudio_large(form) for form in forms}
    sound |= {f"Hugging Face Wav2Vec2-Large {form}": lambda form=form: hugging_face_large(form) for form in forms}
    return {"timm ViT-L/16": timm_vit, "Hugging Face ViT-L/16": hugging_face_vit, **sound}


def main() -> None:
    """Compare each, print the table, and end with the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "encoders")
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    largest = 0.0
    for name, difference in cases(folder).items():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            found = difference()
        finally:
            shutil.rmtree(folder)
        print(f"{name:40} largest difference {found:.1e} standard deviations", flush=True)
        largest = max(largest, found)
    finish("encoders", ours=largest, peer=BAR, bar=1.0)


if __name__ == "__main__":
    main()

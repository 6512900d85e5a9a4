"""DINOv2 (Oquab et al. 2024) in Hugging Face's module code; folders of Hugging Face."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_mm.modalities.family import Family
from megatron_mm.modalities.image.spec import ImageConfig

PATCHES = "embeddings.patch_embeddings.projection"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""What it was trained on: ImageNet's, where our pixels have 0.5 and 0.5."""


class Dinov2(Family):
    """A class token and patches, layers with scales, and the final norm. No stock class has it with a Llama."""

    names = (
        (r"^dinov2\.", ""),
        # As transformers 4 names them and transformers 5 still writes them.
        (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    )
    left_behind = r"(dinov2\.)?embeddings\.mask_token|classifier\..*"
    meaning = ("num_attention_heads", "patch_size", "hidden_act", "use_swiglu_ffn")
    sizes = "image.num_layers, hidden_size, ffn_hidden_size, image_size, patch_size"
    model_type = "dinov2"
    keys = {  # noqa: RUF012
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "num_attention_heads": "num_attention_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
    }

    def build(self, config: ImageConfig) -> nn.Module:
        """Return a Dinov2Model without the token that stands for masked patches."""
        from transformers import Dinov2Config, Dinov2Model

        tower = Dinov2Model(Dinov2Config(**self.shape(config), attn_implementation="sdpa"))
        tower.embeddings.mask_token = None
        return tower

    def features(self, tower: nn.Module, batch: Tensor) -> Tensor:
        """Return the features of images behind the final norm, without the class token."""
        return tower(batch).last_hidden_state[:, 1:]

    def first_tokens(self, config: ImageConfig) -> int:
        """Return 1: the class token stands before the patches."""
        return 1

    def fitted(self, weights: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
        """Return the weights for pixels in [-1, 1]: those of ImageNet's mean and deviation, folded into the patches."""
        weight, bias = (weights[f"{PATCHES}.{part}"] for part in ("weight", "bias"))
        mean, deviation = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, DEVIATION))
        shift = (weight * (0.5 - mean) / deviation).sum((1, 2, 3))
        return weights | {f"{PATCHES}.weight": weight * 0.5 / deviation, f"{PATCHES}.bias": bias + shift}

    def shape(self, config: ImageConfig) -> dict[str, Any]:
        """Return the settings of Hugging Face's module."""
        sizes = {theirs: getattr(config, ours) for ours, theirs in self.keys.items()}
        ratio = {"mlp_ratio": config.ffn_hidden_size // config.hidden_size}
        return {**sizes, **ratio, "use_mask_token": False, "drop_path_rate": 0.0, "attention_probs_dropout_prob": 0.0}

    def description(self, config: ImageConfig) -> dict[str, Any]:
        """Return the settings of the module that an export has, the same one."""
        return {"model_type": self.model_type, "architectures": ["Dinov2Model"], **self.shape(config)}

    def settings(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return our settings that make `description` of an encoder."""
        return super().settings(description) | {
            "ffn_hidden_size": description["hidden_size"] * description["mlp_ratio"]
        }


FAMILY = Dinov2()

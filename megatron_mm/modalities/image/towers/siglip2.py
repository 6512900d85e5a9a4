"""SigLIP 2 at a fixed size (Tschannen et al. 2025) in Hugging Face's module code; folders of Hugging Face.

The checkpoints google/siglip2-*-patch*-SIZE are of transformers' model_type siglip, as those of the first SigLIP are;
the ones for any aspect ratio (naflex) are another module, which is not this one.
"""

from typing import Any

from torch import Tensor, nn

from megatron_mm.modalities.family import Family
from megatron_mm.modalities.image.positions import resize_positions
from megatron_mm.modalities.image.spec import ImageConfig

POSITIONS = "embeddings.position_embedding.weight"


class Siglip2(Family):
    """Patches without a class token, pre-norm layers and the final norm. No stock class has it beside a Llama."""

    names = ((r"^vision_model\.", ""),)
    left_behind = r"text_model\..*|(vision_model\.)?head\..*|logit_scale|logit_bias"
    meaning = ("num_attention_heads", "hidden_act", "patch_size", "layer_norm_eps", "num_channels")
    sizes = "image.num_layers, hidden_size, ffn_hidden_size, patch_size"
    model_type = "siglip_vision_model"
    keys = {  # noqa: RUF012
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
        "image_size": "image_size",
        "patch_size": "patch_size",
    }

    def build(self, config: ImageConfig) -> nn.Module:
        """Return a SiglipVisionModel without the head that pools."""
        from transformers import SiglipVisionConfig, SiglipVisionModel

        return SiglipVisionModel(SiglipVisionConfig(**self.shape(config), attn_implementation="sdpa"))

    def features(self, tower: nn.Module, batch: Tensor) -> Tensor:
        """Return the features of images behind the final norm, (num_images, num_patches, width)."""
        return tower(batch).last_hidden_state

    def described(self, folder: dict[str, Any]) -> dict[str, Any]:
        """Return the description of the vision part; what a folder does not say is as transformers has it."""
        from transformers import SiglipVisionConfig

        return SiglipVisionConfig().to_dict() | folder.get("vision_config", folder)

    def fitted(self, weights: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
        """Return the weights with positions resized to those of `tower`."""
        if POSITIONS not in weights:
            return weights
        own = tower.get_parameter(POSITIONS).shape[0]
        resized = resize_positions(weights[POSITIONS].unsqueeze(0), num_tokens=own, class_token=False)
        return weights | {POSITIONS: resized.squeeze(0)}

    def shape(self, config: ImageConfig) -> dict[str, Any]:
        """Return the settings of Hugging Face's module."""
        return {
            **{theirs: getattr(config, ours) for ours, theirs in self.keys.items()},
            "num_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "vision_use_head": False,
        }

    def description(self, config: ImageConfig) -> dict[str, Any]:
        """Return the settings of the module that an export has, the same one."""
        return {"model_type": self.model_type, "architectures": ["SiglipVisionModel"], **self.shape(config)}


FAMILY = Siglip2()

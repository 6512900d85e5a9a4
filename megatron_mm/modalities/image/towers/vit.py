"""ViT (Dosovitskiy et al. 2021) in Hugging Face's module code; files of timm and Hugging Face; InternVL in exports."""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from megatron_mm.modalities.family import Family
from megatron_mm.modalities.image.positions import resize_positions
from megatron_mm.modalities.image.spec import ImageConfig

POSITIONS = "embeddings.position_embeddings"


class Vit(Family):
    """Patches, with a class token before them or without, pre-norm layers, the final norm left to the projector.

    With the projector's norm in the final norm's place, the pair is exactly the vision half of InternVL. The tower
    keeps the published norm, frozen, so that it remains the complete ViT that pretrained files hold.
    """

    names = (
        # timm
        (r"blocks\.", "layers."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.attn\.", ".attention."),
        (r"^norm\.", "layernorm."),
        (r"^cls_token$", "embeddings.cls_token"),
        (r"^pos_embed$", POSITIONS),
        (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
        # Hugging Face, as transformers 4 names them and transformers 5 still writes them
        (r"^vit\.", ""),
        (r"^encoder\.layer\.", "layers."),
        (r"\.attention\.attention\.(query|key|value)\.", lambda found: f".attention.{found[1][0]}_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    )
    left_behind = r"(vit\.)?(head|fc_norm|classifier|pooler)\..*"
    meaning = ("num_attention_heads", "hidden_act", "patch_size")
    sizes = "image.num_layers, hidden_size, ffn_hidden_size, patch_size, class_token"
    norm, like = "layernorm", "layers.0.layernorm_before.weight"
    model_type = "internvl_vision"
    keys = {  # noqa: RUF012
        "num_layers": "num_hidden_layers",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads",
    }

    def build(self, config: ImageConfig) -> nn.Module:
        """Return a ViTModel without pooling, and without its class token if the settings have none."""
        from transformers import ViTConfig, ViTModel

        tower = ViTModel(
            ViTConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.num_layers,
                num_attention_heads=config.num_attention_heads,
                intermediate_size=config.ffn_hidden_size,
                image_size=config.image_size,
                patch_size=config.patch_size,
                layer_norm_eps=1e-6,
                hidden_act="gelu",
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            ),
            add_pooling_layer=False,
        )
        if not config.class_token:
            embeddings = tower.embeddings
            embeddings.position_embeddings = nn.Parameter(embeddings.position_embeddings[:, 1:].detach().clone())
            del embeddings.cls_token
        return tower

    def features(self, tower: nn.Module, batch: Tensor) -> Tensor:
        """Return the features of images before the final norm, (num_images, num_patches, width)."""
        embeddings = tower.embeddings
        first = int(hasattr(embeddings, "cls_token"))
        hidden = embeddings(batch) if first else embeddings.patch_embeddings(batch) + embeddings.position_embeddings
        for layer in tower.layers:
            hidden = layer(hidden)
        return hidden[:, first:]

    def fitted(self, weights: dict[str, Tensor], tower: nn.Module) -> dict[str, Tensor]:
        """Return queries, keys and values apart, and positions resized to those of `tower`."""
        fitted = {}
        for name, value in weights.items():
            if fused := re.fullmatch(r"(.*\.attention)\.qkv\.(weight|bias)", name):  # timm: all queries, keys, values
                parts = zip("qkv", value.chunk(3))
                fitted |= {f"{fused[1]}.{letter}_proj.{fused[2]}": part for letter, part in parts}
            elif name == POSITIONS:
                own = tower.get_parameter(POSITIONS).shape[1]
                fitted[name] = resize_positions(
                    value, num_tokens=own, class_token=hasattr(tower.embeddings, "cls_token")
                )
            else:
                fitted[name] = value
        return fitted

    def description(self, config: ImageConfig) -> dict[str, Any]:
        """Return InternVL's: a ViT whose final norm is the identity and whose LayerScale is one."""
        return {
            "model_type": self.model_type,
            "architectures": ["InternVLVisionModel"],
            **{theirs: getattr(config, ours) for ours, theirs in self.keys.items()},
            "image_size": [config.image_size] * 2,
            "patch_size": [config.patch_size] * 2,
            "attention_bias": True,
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
            "use_mean_pooling": True,
            "layer_scale_init_value": 1.0,
            "use_absolute_position_embeddings": True,
        }

    def settings(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return our settings of InternVL's; a size that is no square's side is left to the comparison."""
        found = super().settings(description)
        for key in ("image_size", "patch_size"):
            if key in description:
                size = description[key]
                found[key] = size[0] if isinstance(size, list) else size
        return found

    def first_tokens(self, config: ImageConfig) -> int:
        """Return the class token, if there is one."""
        return int(config.class_token)

    def neutral(self, config: ImageConfig) -> Iterator[str]:
        """Yield the names of InternVL's LayerScale."""
        for number in range(config.num_layers):
            yield from (f"layers.{number}.lambda_1", f"layers.{number}.lambda_2")

    def exported(self, name: str) -> str:
        """Return InternVL's name of one of the module's tensors."""
        name = re.sub(r"^layers\.", "encoder.layer.", name)
        return name.replace(".attention.o_proj.", ".attention.projection_layer.")

    def imported(self, name: str) -> str:
        """Return the module's name of one of InternVL's tensors."""
        name = re.sub(r"^encoder\.layer\.", "layers.", name)
        return name.replace(".attention.projection_layer.", ".attention.o_proj.")


FAMILY = Vit()

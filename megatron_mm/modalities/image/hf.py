"""Images in exports: InternVL for text and images, and their part of the full export."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mm.modalities.exports import Exports
from megatron_mm.modalities.image.spec import IMAGE, ImageConfig


class InternVL:
    """transformers' InternVLForConditionalGeneration."""

    model_type, architecture = "internvl", "InternVLForConditionalGeneration"
    auto_class, pipeline = "AutoModelForImageTextToText", "image-text-to-text"
    token_names = {"video_token": "audio"}  # noqa: RUF012
    """InternVL's processor wants one; a text+image model has no other use for the token of sound."""

    def refusal(self, section: ImageConfig) -> str | None:
        """Return why InternVL cannot have the encoder of `section`, None if it can."""
        if section.encoder != "vit":
            return f"image.encoder={section.encoder} is no ViT, and InternVL has one"
        if not section.class_token:
            return "image.class_token=false is a ViT without a class token, and InternVL's has one"
        return None

    def config(self, section: ImageConfig) -> dict[str, Any]:
        """Return what its config.json says of images beside their encoder."""
        return {
            "image_seq_length": section.tokens_per_image,
            "downsample_ratio": 0.5 if section.pixel_shuffle else 1.0,
            "projector_hidden_act": "gelu",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
        } | _tiles(section)

    def processor(self, section: ImageConfig) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the parts of its processor, by their names, and the settings of its own."""
        video = {"video_processor_type": "InternVLVideoProcessor"} | squashing(section)
        own = {"processor_class": "InternVLProcessor", "image_seq_length": section.tokens_per_image}
        return {"video_processor": video, "image_processor": tiling(section)}, own

    def files(self, section: ImageConfig) -> dict[str, dict[str, Any]]:
        """Return what else is in the folder, by the name of the file."""
        video = {"video_processor_type": "InternVLVideoProcessor", **squashing(section)}
        return {"video_preprocessor_config.json": video}


class ImageExports(Exports):
    """Pixels in [-1, 1] for an image processor of transformers that squashes, or cuts into tiles."""

    modality = IMAGE
    describes, tower, projector = "vision_config", "vision_tower", "multi_modal_projector"
    inputs, takes = ("pixel_values",), "images"
    stock = InternVL()

    def config(self, section: ImageConfig) -> dict[str, Any]:
        """Return what the config.json of a full export says of images beside their encoder."""
        return {"image_seq_length": section.tokens_per_image} | _unusual(section)

    def processor(self, section: ImageConfig) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        """Return the image processor of a full export, and the settings of the processor's own."""
        squash = {"image_processor_type": "ViTImageProcessor"} | squashing(section)
        image = squash if section.tiles == 1 else tiling(section)
        return {"image_processor": image}, {"image_seq_length": section.tokens_per_image}

    def settings(self, description: dict[str, Any]) -> dict[str, Any]:
        """Return our image.* settings that make a folder's config.json."""
        shuffled = description.get("image_pixel_shuffle", description.get("downsample_ratio") == 0.5)
        found = super().settings(description) | {"pixel_shuffle": shuffled, "tiles": description.get("image_tiles", 1)}
        if found["encoder"] == "vit":
            found["class_token"] = description.get("image_first_tokens", 1) > 0
        return found

    def unlike(self, description: dict[str, Any], section: ImageConfig) -> list[str]:
        """Return the same as of every modality, and tiles, which a config.json says only where there are several."""
        theirs = description.get("image_tiles", section.tiles)
        squashes = [f"image_tiles={theirs}, ours has 1"] if section.tiles == 1 != theirs else []
        return super().unlike(description, section) + squashes

    def model_inputs(self, items: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Return pixel_values (squares of all images, 3, image_size, image_size)."""
        return {"pixel_values": torch.stack([unit for units in items for unit in units]).float() / 127.5 - 1.0}


def _unusual(section: ImageConfig) -> dict[str, Any]:
    """Return what the config.json of a full export says only where it is not as usual."""
    first = IMAGE.family(section).first_tokens(section)
    found = {"image_first_tokens": first} if first != 1 else {}
    return found | ({"image_pixel_shuffle": True} if section.pixel_shuffle else {}) | _tiles(section)


def _tiles(section: ImageConfig) -> dict[str, Any]:
    """Return what a config.json says of tiles, which transformers itself reads of the processor alone."""
    return {"image_tiles": section.tiles} if section.tiles > 1 else {}


def tiling(section: ImageConfig) -> dict[str, Any]:
    """Return the settings of InternVL's image processor, which cuts into tiles as our decoding does."""
    patches = {"crop_to_patches": section.tiles > 1, "max_patches": section.tiles}
    return {"image_processor_type": "GotOcr2ImageProcessor"} | patches | squashing(section) | {"min_patches": 1}


def squashing(section: ImageConfig) -> dict[str, Any]:
    """Return the settings of an image processor that squashes as our decoding does."""
    return {
        "size": {"height": section.image_size, "width": section.image_size},
        "resample": 3,  # bicubic
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }


EXPORTS = ImageExports()

"""Images in an exported megatron_mm model: a stock tower of transformers, and what its processor makes of them."""

import importlib
import io

from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class Patches(nn.Module):
    """What InternVL's encoder is given by a ViT without a class token."""

    def __init__(self, embeddings):
        super().__init__()
        self.patch_embeddings = embeddings.patch_embeddings
        self.position_embeddings = nn.Parameter(embeddings.position_embeddings[:, 1:].detach().clone())

    def forward(self, pixel_values):
        """(num_images, 3, size, size) to (num_images, num_patches, width)."""
        return self.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2) + self.position_embeddings


class ImageModel:
    """The model's methods for images."""

    def get_image_features(self, pixel_values, **kwargs):
        """(num_squares, 3, size, size) to pooler_output (num_squares, num_tokens, hidden_size), no class token."""
        tower, pixel_values = self.vision_tower, pixel_values.to(self.dtype)
        if isinstance(tower.embeddings, Patches):
            features = tower.encoder(tower.embeddings(pixel_values))[0]
        else:
            features = tower(pixel_values).last_hidden_state[:, self.config.image_first_tokens :]
        features = _shuffled(features) if self.config.image_pixel_shuffle else features
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.multi_modal_projector(features)
        )


def _shuffled(features):
    """(num_images, num_patches, width) to (num_images, num_patches / 4, 4 * width): two by two patches end to end."""
    num_images, num_patches, width = features.shape
    half = round(num_patches**0.5) // 2
    squares = features.view(num_images, half, 2, half, 2, width)
    return squares.permute(0, 1, 3, 2, 4, 5).reshape(num_images, half * half, 4 * width)


class ImageProcessor:
    """The processor's methods for images."""

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """Return what stands for an image: its start, a placeholder a feature, its end."""
        names = self.tokenizer
        squares = int(image_inputs["num_patches"][image_idx]) if "num_patches" in image_inputs else 1
        return names.start_image_token + self.image_token * self.image_seq_length * squares + names.end_image_token

    def process_image(self, images, **kwargs):
        """Return the model's inputs of `images`, and what stands for each in the text."""
        inputs = self.image_processor(images, **kwargs)
        number = len(inputs["num_patches"] if "num_patches" in inputs else inputs["pixel_values"])
        whole = [self.replace_image_token(inputs, image_idx) for image_idx in range(number)]
        return {"pixel_values": inputs["pixel_values"]}, whole

    def _process_images(self, images, **kwargs):
        """Return the same to transformers 5, whose processor expands the placeholders."""
        inputs, whole = super()._process_images(images, **kwargs)
        inputs.pop("num_patches", None)  # the placeholders say it, and the model has no such argument
        return inputs, whole

    def open_image(self, data):
        """Return an image of a document as `images` takes it."""
        return importlib.import_module("PIL.Image").open(io.BytesIO(data)).convert("RGB")

    def count_image(self, image_sizes):
        """Return the tokens of images of these sizes, as vLLM asks for them."""
        squares = [1] * len(image_sizes)
        if getattr(self.image_processor, "crop_to_patches", False):
            squares = [self.image_processor.get_number_of_image_patches(*size, {}) for size in image_sizes]
        counts = [self.image_seq_length * number + 2 for number in squares]
        return {"num_image_tokens": counts, "num_image_patches": squares}


class MODALITY:
    """What the model and its processor ask of images."""

    name, argument, sizes = "image", "images", "image_sizes"
    inputs = ("pixel_values",)
    encoder, model_type = "vision_config", "internvl_vision"
    tower, projector = "vision_tower", "multi_modal_projector"
    layers = ("InternVLVisionLayer", "SiglipEncoderLayer")
    settings = {"image_seq_length": 196, "image_first_tokens": 1, "image_pixel_shuffle": False, "image_tiles": 1}  # noqa: RUF012
    parts = ("image_processor",)
    model, processor = ImageModel, ImageProcessor

    @staticmethod
    def build(config):
        """Return the tower; InternVL's ViT has no class token if none is to be dropped."""
        tower = AutoModel.from_config(config.vision_config)
        if config.vision_config.model_type == "internvl_vision" and not config.image_first_tokens:
            tower.embeddings = Patches(tower.embeddings)
        return getattr(tower, "vision_model", tower)  # transformers 4 has SigLIP's in a shell

    @staticmethod
    def set_up(config):
        """Leave the configuration as it is."""

    @staticmethod
    def set_up_processor(processor):
        """Leave the processor as it is."""

    @staticmethod
    def width(config):
        """Return the width of the features."""
        return config.vision_config.hidden_size * (4 if config.image_pixel_shuffle else 1)

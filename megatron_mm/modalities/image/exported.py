"""Images in an exported megatron_mm model: a stock tower of transformers, and what its processor makes of them."""

import importlib
import io

from transformers.modeling_outputs import BaseModelOutputWithPooling


class ImageModel:
    """The model's methods for images."""

    def get_image_features(self, pixel_values, **kwargs):
        """(num_images, 3, size, size) to pooler_output (num_images, num_patches, hidden_size), no class token."""
        features = self.vision_tower(pixel_values.to(self.dtype)).last_hidden_state[:, 1:]
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=self.multi_modal_projector(features)
        )


class ImageProcessor:
    """The processor's methods for images."""

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """Return what stands for an image: its start, a placeholder a feature, its end."""
        names = self.tokenizer
        return names.start_image_token + self.image_token * self.image_seq_length + names.end_image_token

    def process_image(self, images, **kwargs):
        """Return the model's inputs of `images`, and what stands for each in the text."""
        inputs = {"pixel_values": self.image_processor(images, **kwargs)["pixel_values"]}
        return inputs, [self.replace_image_token(inputs, number) for number in range(len(inputs["pixel_values"]))]

    def open_image(self, data):
        """Return an image of a document as `images` takes it."""
        return importlib.import_module("PIL.Image").open(io.BytesIO(data)).convert("RGB")

    def count_image(self, image_sizes):
        """Return the tokens of images of these sizes, as vLLM asks for them."""
        counts = [self.image_seq_length + 2] * len(image_sizes)
        return {"num_image_tokens": counts, "num_image_patches": [1] * len(image_sizes)}


class MODALITY:
    """What the model and its processor ask of images."""

    name, argument, sizes = "image", "images", "image_sizes"
    inputs = ("pixel_values",)
    encoder, model_type = "vision_config", "internvl_vision"
    tower, projector = "vision_tower", "multi_modal_projector"
    layers = ("InternVLVisionLayer",)
    settings = {"image_seq_length": 196}  # noqa: RUF012
    parts = ("image_processor",)
    model, processor = ImageModel, ImageProcessor

    @staticmethod
    def set_up(config):
        """Leave the configuration as it is."""

    @staticmethod
    def set_up_processor(processor):
        """Leave the processor as it is."""

    @staticmethod
    def width(config):
        """Return the width of the features."""
        return config.vision_config.hidden_size

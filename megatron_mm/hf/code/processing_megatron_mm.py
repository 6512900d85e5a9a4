"""Processor of an exported megatron_mm model: text with placeholders, and media, to model inputs.

`<|image|>` and `<|audio|>` in the text stand for the images and recordings, in their order; so do the placeholders of
other modalities. `read_file` turns a PDF, or any other file that the training data was read from, into such a text and
its media.
"""

import importlib

from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .modalities_megatron_mm import MODALITIES, ProcessorSettings

OLD = not hasattr(ProcessorMixin, "get_text_with_replacements")
"""transformers 4, whose processor expands no placeholders."""
OWN = [modality for modality in MODALITIES if OLD or modality.argument not in ("images", "audio")]
"""The modalities that transformers' processor does not expand."""
AUTO = {
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "tokenizer": "AutoTokenizer",
}


class MegatronMMProcessor(ProcessorSettings, *(modality.processor for modality in MODALITIES), ProcessorMixin):
    """The tokenizer, and what transformers has for each modality, in one."""

    def set_up(self, given):
        """Take the parts and the settings that the processor was made of."""
        chat_template = given.pop("chat_template")
        parts = [given.pop(part) for modality in MODALITIES for part in modality.parts]
        tokenizer = given.pop("tokenizer")
        for name, value in given.items():
            setattr(self, name, value)
        for modality in MODALITIES:
            token = getattr(tokenizer, f"context_{modality.name}_token")
            setattr(self, f"{modality.name}_token", token)
            setattr(self, f"{modality.name}_token_id", tokenizer.convert_tokens_to_ids(token))
        ProcessorMixin.__init__(self, *parts, tokenizer, chat_template=chat_template)
        for modality in MODALITIES:
            modality.set_up_processor(self)

    def __call__(self, images=None, text=None, videos=None, audio=None, return_tensors=None, **kwargs):
        """Return the inputs of the model: media of other modalities are arguments of their names."""
        given = kwargs | {"images": images, "audio": audio}
        data = {}
        for modality in OWN:
            media = given.get(modality.argument)
            kwargs.pop(modality.argument, None)
            if media is not None:
                inputs, whole = getattr(self, f"process_{modality.name}")(media, return_tensors=return_tensors)
                text = _expand(text, getattr(self, f"{modality.name}_token"), whole)
                data.update(inputs)
        if OLD:
            known = ("padding", "truncation", "max_length", "add_special_tokens", "padding_side")
            options = {name: value for name, value in kwargs.items() if name in known}
            text = [text] if isinstance(text, str) else list(text)
            return BatchFeature({**self.tokenizer(text, return_tensors=return_tensors, **options), **data})
        inputs = super().__call__(images, text, videos, audio, return_tensors=return_tensors, **kwargs)
        inputs.update(data)
        return inputs

    def read_file(self, path):
        """Return {"text", "images", "audio", ...} of a PDF, or any other file, in the reading order of training.

        Needs the megatron_mm package, which read the training data.
        """
        try:
            read = importlib.import_module("megatron_mm.ingest.read")
        except ImportError as error:
            raise ImportError("reading files needs the megatron_mm package; text and media do not") from error
        documents, rejections = read.read_file(importlib.import_module("pathlib").Path(path))
        if not documents:
            raise ValueError(f"{path} cannot be read: {rejections[0].reason}")
        text, media = "", {modality.name: [] for modality in MODALITIES}
        for segment in documents[0].segments:
            if hasattr(segment, "text"):
                text += segment.text
            else:
                media[segment.modality].append(getattr(self, f"open_{segment.modality}")(segment.data))
                text += getattr(self, f"{segment.modality}_token")
        return {"text": text} | {modality.argument: media[modality.name] or None for modality in MODALITIES}

    def _get_num_multimodal_tokens(self, **sizes):
        """Return the tokens of media of these sizes; vLLM asks."""
        from transformers.processing_utils import MultiModalData

        counts = {}
        for modality in MODALITIES:
            if sizes.get(modality.sizes) is not None:
                counts.update(getattr(self, f"count_{modality.name}")(sizes[modality.sizes]))
        return MultiModalData(**counts)

    @property
    def model_input_names(self):
        """What the model takes."""
        return ["input_ids", "attention_mask", *(name for modality in MODALITIES for name in modality.inputs)]


if OLD:  # transformers 4 wants them, 5 warns of them
    MegatronMMProcessor.attributes = [*(part for modality in MODALITIES for part in modality.parts), "tokenizer"]
    for _part in MegatronMMProcessor.attributes:
        setattr(MegatronMMProcessor, f"{_part}_class", AUTO[_part])


def _expand(texts, token, replacements):
    """Replace each `token` by the next of `replacements`."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    if sum(text.count(token) for text in texts) != len(replacements):
        raise ValueError(f"the text has not as many {token} as there are media: {len(replacements)}")
    following = iter(replacements)
    return ["".join(p if n == 0 else next(following) + p for n, p in enumerate(t.split(token))) for t in texts]

"""Processor of an exported megatron_mm model: text with placeholders, images and sound to model inputs.

`<|image|>` and `<|audio|>` in the text stand for the images and recordings, in their order. `read_file` turns a PDF, or
any other file that the training data was read from, into such a text and its media.
"""

import importlib
import io

import numpy as np
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin

CONVOLUTIONS = ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 2), (2, 2))
"""Kernel and stride of Wav2Vec 2.0's feature encoder."""


def audio_frames(num_samples, chunk_samples):
    """Return the frames of a clip of which each chunk is encoded on its own: 49 a second of 16,000 samples."""
    total = 0
    for start in range(0, num_samples, chunk_samples):
        frames = min(chunk_samples, num_samples - start)
        for kernel, stride in CONVOLUTIONS:
            frames = (frames - kernel) // stride + 1 if frames >= kernel else 0
        total += frames
    return total


class MegatronMMProcessor(ProcessorMixin):
    """Image processor, feature extractor and tokenizer in one."""

    if not hasattr(ProcessorMixin, "get_text_with_replacements"):  # transformers 4 wants them, 5 warns of them
        attributes = ["image_processor", "feature_extractor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        feature_extractor_class = "AutoFeatureExtractor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor=None,
        feature_extractor=None,
        tokenizer=None,
        image_seq_length=196,
        audio_chunk_samples=16000,
        normalize_audio=False,
        chat_template=None,
        **kwargs,
    ):
        self.image_seq_length, self.audio_chunk_samples = image_seq_length, audio_chunk_samples
        self.normalize_audio = feature_extractor.do_normalize = normalize_audio
        self.image_token, self.audio_token = tokenizer.context_image_token, tokenizer.context_audio_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)
        super().__init__(image_processor, feature_extractor, tokenizer, chat_template=chat_template)

    def replace_image_token(self, image_inputs, image_idx, **kwargs):
        """Return what stands for an image: its start, 196 placeholders, its end."""
        names = self.tokenizer
        return names.start_image_token + self.image_token * self.image_seq_length + names.end_image_token

    def replace_audio_token(self, audio_inputs, audio_idx, **kwargs):
        """Return what stands for a recording: its start, a placeholder a frame, its end."""
        num_samples = int(np.asarray(audio_inputs["input_values_mask"][audio_idx]).sum())
        frames = audio_frames(num_samples, self.audio_chunk_samples)
        return self.tokenizer.start_audio_token + self.audio_token * frames + self.tokenizer.end_audio_token

    def _process_audio(self, audio, **kwargs):
        kwargs.pop("return_tensors", None)
        kwargs.pop("padding", None)
        kwargs.setdefault("sampling_rate", self.feature_extractor.sampling_rate)
        clips = [np.asarray(clip, dtype=np.float32) for clip in audio]
        outputs = self.feature_extractor(clips, padding=True, return_attention_mask=True, return_tensors="pt", **kwargs)
        inputs = BatchFeature(
            {"input_values": outputs["input_values"], "input_values_mask": outputs["attention_mask"].bool()}
        )
        return inputs, [self.replace_audio_token(inputs, audio_idx=number) for number in range(len(clips))]

    if not hasattr(ProcessorMixin, "get_text_with_replacements"):  # transformers 4: expand the placeholders here

        def __call__(self, images=None, text=None, videos=None, audio=None, return_tensors=None, **kwargs):
            """Return the inputs of the model."""
            text = [text] if isinstance(text, str) else list(text)
            data = {}
            if images is not None:
                data["pixel_values"] = self.image_processor(images, return_tensors=return_tensors)["pixel_values"]
                whole = [self.replace_image_token(None, number) for number in range(len(data["pixel_values"]))]
                text = _expand(text, self.image_token, whole)
            if audio is not None:
                audio = audio if isinstance(audio, (list, tuple)) else [audio]
                inputs, whole = self._process_audio(audio)
                data.update(inputs)
                text = _expand(text, self.audio_token, whole)
            known = ("padding", "truncation", "max_length", "add_special_tokens", "padding_side")
            options = {name: value for name, value in kwargs.items() if name in known}
            return BatchFeature({**self.tokenizer(text, return_tensors=return_tensors, **options), **data})

    def read_file(self, path):
        """Return {"text", "images", "audio"} of a PDF, or any other file, in the reading order of training.

        Needs the megatron_mm package, which read the training data.
        """
        try:
            read = importlib.import_module("megatron_mm.ingest.read")
        except ImportError as error:
            raise ImportError("reading files needs the megatron_mm package; text, images and sound do not") from error
        av, image = importlib.import_module("av"), importlib.import_module("PIL.Image")
        documents, rejections = read.read_file(importlib.import_module("pathlib").Path(path))
        if not documents:
            raise ValueError(f"{path} cannot be read: {rejections[0].reason}")
        text, images, audio = "", [], []
        for segment in documents[0].segments:
            if hasattr(segment, "text"):
                text += segment.text
            elif hasattr(segment, "num_samples"):
                with av.open(io.BytesIO(segment.data)) as container:
                    clip = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
                audio.append(clip.astype(np.float32) / 32768.0)
                text += self.audio_token
            else:
                images.append(image.open(io.BytesIO(segment.data)).convert("RGB"))
                text += self.image_token
        return {"text": text, "images": images or None, "audio": audio or None}

    def _get_num_multimodal_tokens(self, image_sizes=None, audio_lengths=None, **kwargs):
        """Return the tokens of media of these sizes; vLLM asks."""
        from transformers.processing_utils import MultiModalData

        counts = {}
        if image_sizes is not None:
            counts["num_image_tokens"] = [self.image_seq_length + 2] * len(image_sizes)
            counts["num_image_patches"] = [1] * len(image_sizes)
        if audio_lengths is not None:
            counts["num_audio_tokens"] = [audio_frames(n, self.audio_chunk_samples) + 2 for n in audio_lengths]
        return MultiModalData(**counts)

    @property
    def model_input_names(self):
        """What the model takes."""
        return ["input_ids", "attention_mask", "pixel_values", "input_values", "input_values_mask"]


def _expand(texts, token, replacements):
    """Replace each `token` by the next of `replacements`."""
    if sum(text.count(token) for text in texts) != len(replacements):
        raise ValueError(f"the text has not as many {token} as there are media: {len(replacements)}")
    following = iter(replacements)
    return ["".join(p if n == 0 else next(following) + p for n, p in enumerate(t.split(token))) for t in texts]

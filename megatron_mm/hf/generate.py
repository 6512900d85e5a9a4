"""Text from text, images, audio and PDFs: transformers' generate over an export.

Not megatron-core's inference: that engine wants its own GPTModel, a GPU and a process group, and knows no images or
sound. An export is tested to give the training model's logits, runs on any device, and brings KV cache, batching and
sampling that are kept by others. Prompts are read, tokenized and decoded by the code that the training data went
through.
"""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn

from megatron_mm.data.media import reference_decoders
from megatron_mm.engine import device
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf import files
from megatron_mm.hf.export import Options, export, verify_if_listed
from megatron_mm.hf.load import PARTS
from megatron_mm.hf.tensors import safetensors_files
from megatron_mm.ingest.document import Document
from megatron_mm.ingest.encode import encode_document
from megatron_mm.modalities import BY_NAME, EncoderSection, Geometries, default_geometries
from megatron_mm.outside import checked, load_json
from megatron_mm.tokenizer import TextTokenizer

log = logging.getLogger(__name__)

FOREIGN = (OSError, SafetensorError, StrictDataclassError, ValueError, TypeError, LookupError, AttributeError)
"""What transformers and its libraries raise of a folder whose files are damaged, or say what no model is."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Tokens to choose among; 0: all."""
    top_p: float = 1.0
    """Choose among the most probable tokens that have this much probability together."""
    seed: int = 1234

    def __post_init__(self) -> None:
        allowed = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (0.0 <= self.temperature < float("inf"), "0 or more; 0 takes the most probable token"),
            "top_k": (self.top_k >= 0, "0 or more; 0 chooses among all tokens"),
            "seed": (0 <= self.seed < 2**63, "0 or more, below 2**63"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1; 1 chooses among all tokens"),
        }
        for name, (fits, what) in allowed.items():
            if not fits:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} cannot be: give {what}.")


@dataclass(frozen=True)
class Speaker:
    """A loaded export and what its prompts need."""

    model: nn.Module
    tokenizer: TextTokenizer
    sections: Mapping[str, EncoderSection]
    """What decides how an item is decoded, of each modality that the model can be given, by its name."""


@contextmanager
def opened(path: Path, *, tokenizer_path: Path | None = None, dtype: torch.dtype | None = None, check: bool = True):
    """Give a Speaker of the export or checkpoint at `path`; a checkpoint is exported to a temporary folder first.

    All files are compared with their manifest first, unless `check` is false. Raises DataError if one differs,
    ConfigError if it is neither, is an export and a tokenizer is named, or a checkpoint without one and none is.
    """
    if (path / "config.json").exists():
        if tokenizer_path is not None:
            raise ConfigError(f"--tokenizer {tokenizer_path}: {path} is an export, which brings its own. Leave it out.")
        if check:
            verify_if_listed(path)
        yield load_export(path, dtype)
        return
    if not (path / "manifest.json").exists():
        places = [f"{above}{name}.json" for above in ("*/", "*/*/") for name in ("config", "manifest")]
        inside = sorted(str(file.parent) for place in places for file in path.glob(place))
        hint = f" Did you mean {inside[-1]}?" if inside else ""
        raise ConfigError(
            f"{path} is neither an export (with a config.json) nor a checkpoint (with a manifest.json).{hint}"
        )
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "export"
        export(path, out, tokenizer_path=tokenizer_path, options=Options(kinds=("full",), dtype=dtype), check=check)
        yield load_export(out / "full", dtype)


class Described(TypedDict):
    """What the config.json of an export says."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    model_type: NotRequired[str]


def load_export(folder: Path, dtype: torch.dtype | None = None) -> Speaker:
    """Return the export in `folder`, on this process's device. Raises DataError if its tensors are not its model's."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # The package's own copy of the code that a full export carries: nothing in the folder is executed.
    from megatron_mm.hf.code.modeling_megatron_mm import MegatronMMForConditionalGeneration

    try:
        description = checked(load_json((folder / "config.json").read_bytes()), Described, where="it")
    except ValueError as error:
        raise DataError(f"{folder / 'config.json'} is damaged ({error}). Write the export again.") from error
    safetensors_files(folder)  # for its error: transformers would open whatever the index names
    kind = description.get("model_type")
    model_class, own = transformers.AutoModelForCausalLM, {"trust_remote_code": False}
    if kind == "megatron_mm":
        model_class, own = MegatronMMForConditionalGeneration, {"verify": False}  # `opened` does, for every kind
    elif kind in PARTS:
        model_class = getattr(transformers, files.EXPORTS[PARTS[kind][0]].stock.auto_class)
    try:
        settings = {name: files.EXPORTS[name].settings(description) for name in PARTS.get(kind, ())}
        sections = {name: BY_NAME[name].section(**one) for name, one in settings.items()}
        model, info = model_class.from_pretrained(folder, dtype=dtype or "auto", output_loading_info=True, **own)
    except FOREIGN as error:
        raise DataError(
            f"{folder} is damaged or not whole ({error}). `tools/convert_checkpoint.py verify` names the files."
        ) from error
    wrong = {name: sorted(map(str, keys)) for name, keys in info.items() if name.endswith("_keys") and keys}
    if wrong:
        raise DataError(f"{folder}: its tensors are not those of its config.json: {wrong}.")
    model = model.eval().to(device.current())
    return Speaker(model, TextTokenizer(folder / "tokenizer.json"), sections)


def model_inputs(speaker: Speaker, prompts: Sequence[Document]) -> dict[str, Tensor]:
    """Return the inputs of a batch of prompts, padded on the left.

    Shapes: input_ids, attention_mask (num_prompts, longest), and `media_inputs` of all prompts in their order. Raises
    DataError if a prompt is empty, or has media that the model cannot be given.
    """
    rows: list[Tensor] = []
    media: list[tuple[str, bytes]] = []
    geometries = default_geometries() | speaker.sections
    for prompt in prompts:
        encoded = encode_document(prompt, speaker.tokenizer, geometries=geometries)
        rows.append(torch.from_numpy(encoded.tokens[:-1]).long())  # without the end of the text: it goes on
        if not len(rows[-1]):
            raise DataError("a prompt is empty: there is nothing to continue.")
        for item in encoded.media:
            if item.modality not in speaker.sections:
                raise DataError(f"this export takes no {item.modality}: use OUT/full.")
            media.append((item.modality, item.data))
    pad = speaker.tokenizer.special_ids["pad"]
    longest = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([row.new_full((longest - len(row),), pad), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths.unsqueeze(1)).long()}
    return inputs | media_inputs(media, geometries)


def media_inputs(media: Sequence[tuple[str, bytes]], geometries: Geometries) -> dict[str, Tensor]:
    """Return what an export's model is given for media items, each the name of its modality and its bytes.

    Shapes: as the modality's `model_inputs` has them; nothing of a modality without items. Raises DataError for an item
    that cannot be decoded.
    """
    inputs: dict[str, Tensor] = {}
    decoders = reference_decoders(geometries)
    for name, exports in files.EXPORTS.items():
        items = [decoders[name].units(data) for kind, data in media if kind == name]
        if None in items:
            raise DataError(f"item {items.index(None) + 1} of {len(items)} ({name}) cannot be decoded.")
        inputs |= exports.model_inputs(items) if items else {}
    return inputs


def generate(
    speaker: Speaker,
    prompts: Sequence[Document],
    *,
    sampling: Sampling = Sampling(),
    on_text: Callable[[str], None] | None = None,
) -> list[str]:
    """Return how the model continues each prompt, up to the end of its text.

    `on_text` is given the text of a single prompt piece by piece, as it comes.
    """
    inputs = {name: value.to(device.current()) for name, value in model_inputs(speaker, prompts).items()}
    tokenizer, model = speaker.tokenizer, speaker.model
    longest, trained = inputs["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    if longest + sampling.max_new_tokens > trained:
        log.warning(
            "a prompt of %d tokens and %d new ones are more than the %d of a training sequence: expect worse text. "
            "Shorten the prompt, or lower --max-new-tokens.",
            *(longest, sampling.max_new_tokens, trained),
        )
    end = tokenizer.special_ids["end_of_text"]
    vocab_size = model.get_output_embeddings().weight.shape[0]
    # Neither placeholders, which stand for media, nor rows of the head behind the last id of the tokenizer.
    never = [number for number in tokenizer.special_ids.values() if number != end]
    never += range(tokenizer.info.vocab_size, vocab_size)
    choose: dict[str, Any] = {"do_sample": sampling.temperature > 0.0}
    if choose["do_sample"]:
        choose |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    torch.manual_seed(sampling.seed)
    streamer = _Streamer(tokenizer, on_text) if on_text is not None and len(prompts) == 1 else None
    with torch.no_grad():
        ids = model.generate(
            **inputs,
            **choose,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=end,
            pad_token_id=tokenizer.special_ids["pad"],
            suppress_tokens=never,
            streamer=streamer,
        )
    continued = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in continued]


class _Streamer:
    """Passes on text as soon as its characters are whole; transformers' own wants its own tokenizer."""

    def __init__(self, tokenizer: TextTokenizer, on_text: Callable[[str], None]) -> None:
        self._tokenizer, self._on_text = tokenizer, on_text
        self._ids: list[int] = []
        self._told, self._saw_prompt = 0, False

    def put(self, ids: Tensor) -> None:
        """Take the prompt, then one token after the other."""
        if not self._saw_prompt:
            self._saw_prompt = True
            return
        if ids.item() == self._tokenizer.special_ids["end_of_text"]:
            return
        self._ids.append(int(ids.item()))
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character's other bytes are still to come
            self._on_text(text[self._told :])
            self._told = len(text)

    def end(self) -> None:
        """Pass on what is left."""
        self._on_text(self._tokenizer.decode(self._ids)[self._told :])

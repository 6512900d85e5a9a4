"""The gate of an export: its logits against those that the training model computes from the checkpoint, in FP32.

Both models are built whole in this process, one after the other on one CPU or GPU: FP32 weights must fit its memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.data.decode import decode_chunks, decode_pixels
from megatron_mm.data.loader import Loader
from megatron_mm.engine import device, mesh
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.generate import load_export
from megatron_mm.hf.tensors import CheckpointReader
from megatron_mm.modality import Media
from megatron_mm.model.multimodal import MultimodalModel, build_chunks
from megatron_mm.training.start import load_weights

LIMIT = 1e-4
"""Largest difference of a logit; right exports give some 5e-6, one wrong tensor more than 0.1."""
SEQ_LEN = 1024
"""Tokens of a sample at most: the logits of all of them are held."""
SEARCHED = 200
"""Samples among which those with images and with sound are looked for."""
WHOLE = (
    *("training.precision=fp32", "training.backend=auto", "training.attention=auto", "training.loss_chunk_tokens=0"),
    *(
        "training.micro_batch_size=1",
        "image.pretrained=null",
        "audio.pretrained=null",
        "parallel.tp=1",
        "parallel.pp=1",
    ),
    *("parallel.vpp=1", "parallel.cp=1", "parallel.stage_layers=null", "parallel.embedding_slot=false"),
    *("parallel.loss_slot=false", "parallel.tp_comm_overlap=false", "data.prefetch_steps=0"),
)
"""Settings of the training model in one process."""
INPUTS = {"pixel_values": Media.IMAGE, "input_values": Media.AUDIO, "input_values_mask": Media.AUDIO}


@dataclass(frozen=True)
class Answer:
    """What an export is asked, and the training model's logits: (num_tokens, vocab) float32."""

    inputs: dict[str, Tensor]
    logits: Tensor


class Gate:
    """Compares exports of one checkpoint with the training model on samples of the run's shards, or of others.

    Raises ConfigError if there are none.
    """

    def __init__(self, checkpoint: Path, *, shards: str | None = None, num_samples: int = 4) -> None:
        saved = configs.load_saved(checkpoint / "config.yaml")
        data = [f"data.seq_len={min(saved.data.seq_len, SEQ_LEN)}", "data.validation=[]", "data.changes=[]"]
        data += [f"data.train=[{shards}]"] if shards else []
        self._config = configs.load_saved(checkpoint / "config.yaml", [*WHOLE, *data])
        self.answers = _ask_training_model(self._config, checkpoint, num_samples)

    def compare(self, folder: Path) -> dict[str, str]:
        """Return what was compared and found, for the model card. Raises DataError if the logits are not the same."""
        speaker = load_export(folder, torch.float32)
        largest, positions, kinds = 0.0, 0, set()
        for answer in self.answers:
            media = {INPUTS[name] for name in answer.inputs if name in INPUTS}
            if not media <= speaker.kinds:
                continue
            inputs = {name: value.to(device.current()) for name, value in answer.inputs.items()}
            with torch.no_grad():
                found = speaker.model(**inputs).logits[0].cpu()
            difference = (found - answer.logits).abs().max().item()
            if not difference < LIMIT:  # NaN is no agreement either
                what = " and ".join(sorted(kind.name.lower() for kind in media)) or "text"
                raise DataError(
                    f"{folder}: a logit differs by {difference:.2e} from the training model's on a document of {what}; "
                    f"{LIMIT:.0e} is allowed. The export is wrong: do not use it, and report it."
                )
            largest, positions = max(largest, difference), positions + len(found)
            kinds |= {"text"} | {{Media.IMAGE: "images", Media.AUDIO: "sound"}[kind] for kind in media}
        if not positions:
            raise ConfigError(f"no document of the gate's shards can be given to {folder}: name others with --gate P.")
        spread = torch.cat([answer.logits for answer in self.answers]).std().item()
        return {
            "largest difference of a logit from the training model's, FP32": f"{largest:.1e} (limit {LIMIT:.0e})",
            "compared": f"{positions:,} positions of {', '.join(sorted(kinds))}; their deviation is {spread:.2f}",
        }


def _ask_training_model(config: Config, checkpoint: Path, num_samples: int) -> list[Answer]:
    ranks = mesh.initialize(config)
    try:
        loader = Loader(config.data.train, config=config, mesh=ranks)
        (model,) = build_chunks(config, ranks)
        load_weights([model], config=config, mesh=ranks, path=checkpoint)
        trained = CheckpointReader(checkpoint).tensors["output_layer.weight"].dtype
        if trained != torch.float32:
            _add_types_in(trained, model)
        model.eval()
        return [answer for sample in _choose(loader, num_samples) for answer in _answers(loader, model, sample, config)]
    finally:
        mesh.leave()


def _add_types_in(dtype: torch.dtype, model: MultimodalModel) -> None:
    """Add type embeddings as training in `dtype` does: rounded, where a sum in FP32 would not be."""
    embedding = model.embedding
    sums: list[tuple[nn.Parameter, nn.Parameter]] = [
        (embedding.word_embeddings.weight, embedding.text_type_embedding),
        *(
            (part.projector.linear_2.bias, part.projector.linear_2.type_embedding)
            for part in (embedding.image, embedding.audio)
        ),
    ]
    with torch.no_grad():
        for value, kind in sums:
            value.copy_(value.to(dtype) + kind.to(dtype))
            kind.zero_()


def _choose(loader: Loader, num_samples: int) -> list[int]:
    """Return samples that show every kind of media that the first SEARCHED have, and others up to `num_samples`."""
    numbers = range(min(SEARCHED, loader.num_samples))
    seen: set[frozenset[Media]] = set()
    telling = []
    for number in numbers:
        kinds = {frozenset(media) for _, _, media in _documents(loader, number)}
        if not kinds <= seen:
            telling.append(number)
            seen |= kinds
    return (telling + [number for number in numbers if number not in telling])[: max(num_samples, len(telling))]


def _documents(loader: Loader, sample: int) -> Iterator[tuple[np.void, np.ndarray, list[Media]]]:
    """Yield (PIECE record, ITEM records, their kinds) of each document of a sample."""
    for piece in loader.samples.pieces(sample):
        start, length = int(piece["start"]), int(piece["length"])
        items = loader.shards[piece["shard"]].media(int(piece["document"]))
        inside = [item for item in items if 0 <= int(item["token_offset"]) - start < length]
        yield piece, inside, [Media(int(item["kind"])) for item in inside]


def _answers(loader: Loader, model: MultimodalModel, sample: int, config: Config) -> Iterator[Answer]:
    kept: list[Tensor] = []
    # The loss, which is not wanted, destroys the logits.
    hook = model.output_layer.register_forward_hook(lambda *called: kept.append(called[2][0].squeeze(1).clone()))
    with torch.no_grad():
        model(loader.micro_batch([sample]).to(device.current()))
    hook.remove()
    logits, position = kept[0].float().cpu(), 0
    for piece, items, _ in _documents(loader, sample):
        stop = position + int(piece["length"])
        shard = loader.shards[piece["shard"]]
        first, length = int(piece["start"]), int(piece["length"])
        tokens = shard.tokens(int(piece["document"]), first, first + length)
        media = [(Media(int(item["kind"])), shard.media_bytes(item)) for item in items]
        yield Answer(export_inputs(tokens, media, normalize=config.audio.form == "lv60k"), logits[position:stop])
        position = stop


def export_inputs(tokens: np.ndarray, media: Sequence[tuple[Media, bytes]], *, normalize: bool) -> dict[str, Tensor]:
    """Return what an export is given for one document.

    Shapes: input_ids (1, num_tokens); pixel_values (num_images, 3, 224, 224) and input_values, input_values_mask
    (num_clips, longest clip), if it has such media.
    """
    inputs = {"input_ids": torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)}
    images = [decode_pixels(data) for kind, data in media if kind is Media.IMAGE]
    clips = [torch.cat(decode_chunks(data, normalize=normalize)) for kind, data in media if kind is Media.AUDIO]
    if images:
        inputs["pixel_values"] = torch.stack(images).float() / 127.5 - 1.0
    if clips:
        lengths = torch.tensor([len(clip) for clip in clips])
        inputs["input_values"] = nn.utils.rnn.pad_sequence(clips, batch_first=True)
        inputs["input_values_mask"] = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    return inputs

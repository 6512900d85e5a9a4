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
from megatron_mm.checkpoint.index import CheckpointReader
from megatron_mm.checkpoint.load import load_weights
from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.engine import device, mesh
from megatron_mm.errors import ConfigError, DataError
from megatron_mm.hf.files import EXPORTS
from megatron_mm.hf.generate import load_export, media_inputs
from megatron_mm.modalities import BY_KIND, Geometries
from megatron_mm.model.multimodal import MultimodalModel, build_chunks

LIMIT = 1e-4
"""Largest difference of a logit; right exports give some 5e-6, one wrong tensor more than 0.1."""
SEQ_LEN = 1024
"""Tokens of a sample at most: the logits of all of them are held."""
SEARCHED = 200
"""Samples among which those with images and with sound are looked for."""
WHOLE = (
    *("training.precision=fp32", "training.backend=auto", "training.attention=auto", "training.loss_chunk_tokens=0"),
    *("training.micro_batch_size=1", *(f"{name}.pretrained=null" for name in EXPORTS)),
    *("parallel.tp=1", "parallel.pp=1"),
    *("parallel.vpp=1", "parallel.cp=1", "parallel.stage_layers=null", "parallel.embedding_slot=false"),
    *("parallel.loss_slot=false", "parallel.tp_comm_overlap=false", "data.prefetch_steps=0"),
)
"""Settings of the training model in one process."""
INPUTS = {given: name for name, exports in EXPORTS.items() for given in exports.inputs}
"""The modality of each input of a model that is not text."""


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
            if not media <= speaker.sections.keys():
                continue
            inputs = {name: value.to(device.current()) for name, value in answer.inputs.items()}
            with torch.no_grad():
                found = speaker.model(**inputs).logits[0].cpu()
            difference = (found - answer.logits).abs().max().item()
            if not difference < LIMIT:  # NaN is no agreement either
                what = " and ".join(sorted(media)) or "text"
                raise DataError(
                    f"{folder}: a logit differs by {difference:.2e} from the training model's on a document of {what}; "
                    f"{LIMIT:.0e} is allowed. The export is wrong: do not use it, and report it."
                )
            largest, positions = max(largest, difference), positions + len(found)
            kinds |= {"text"} | {EXPORTS[name].takes for name in media}
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
        *((part.projector.linear_2.bias, part.projector.linear_2.type_embedding) for part in embedding.media.values()),
    ]
    with torch.no_grad():
        for value, kind in sums:
            value.copy_(value.to(dtype) + kind.to(dtype))
            kind.zero_()


def _choose(loader: Loader, num_samples: int) -> list[int]:
    """Return samples that show every kind of media that the first SEARCHED have, and others up to `num_samples`."""
    numbers = range(min(SEARCHED, loader.num_samples))
    seen: set[frozenset[str]] = set()
    telling = []
    for number in numbers:
        kinds = {frozenset(media) for _, _, media in _documents(loader, number)}
        if not kinds <= seen:
            telling.append(number)
            seen |= kinds
    return (telling + [number for number in numbers if number not in telling])[: max(num_samples, len(telling))]


def _documents(loader: Loader, sample: int) -> Iterator[tuple[np.void, np.ndarray, list[str]]]:
    """Yield (PIECE record, ITEM records, their modalities) of each document of a sample."""
    for piece in loader.samples.pieces(sample):
        start, length = int(piece["start"]), int(piece["length"])
        items = loader.shards[piece["shard"]].media(int(piece["document"]))
        inside = [item for item in items if 0 <= int(item["token_offset"]) - start < length]
        yield piece, inside, [BY_KIND[int(item["kind"])].name for item in inside]


def _answers(loader: Loader, model: MultimodalModel, sample: int, config: Config) -> Iterator[Answer]:
    kept: list[Tensor] = []
    # The loss, which is not wanted, destroys the logits.
    hook = model.output_layer.register_forward_hook(lambda *called: kept.append(called[2][0].squeeze(1).clone()))
    with torch.no_grad():
        model(loader.micro_batch([sample]).to(device.current()))
    hook.remove()
    logits, position = kept[0].float().cpu(), 0
    for piece, items, names in _documents(loader, sample):
        stop = position + int(piece["length"])
        shard = loader.shards[piece["shard"]]
        first, length = int(piece["start"]), int(piece["length"])
        tokens = shard.tokens(int(piece["document"]), first, first + length)
        media = [(name, shard.media_bytes(item)) for name, item in zip(names, items)]
        yield Answer(export_inputs(tokens, media, config.encoders), logits[position:stop])
        position = stop


def export_inputs(tokens: np.ndarray, media: Sequence[tuple[str, bytes]], geometries: Geometries) -> dict[str, Tensor]:
    """Return what an export is given for one document: input_ids (1, num_tokens), and `media_inputs`."""
    return {"input_ids": torch.from_numpy(tokens.astype(np.int64)).unsqueeze(0)} | media_inputs(media, geometries)

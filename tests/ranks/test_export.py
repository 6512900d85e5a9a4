"""Exports against the training model that saved the checkpoint: logits, tensors, files, and maps that are wrong."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import run_ranks
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from safetensors.torch import load_file
from small import layout, small_config
from test_reference import as_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from megatron_mm.config import Config
from megatron_mm.data.loader import Loader
from megatron_mm.data.packing import plan_packing
from megatron_mm.engine import mesh as meshes
from megatron_mm.hf import weight_map
from megatron_mm.hf.export import KINDS, Options, export
from megatron_mm.hf.gate import export_inputs
from megatron_mm.hf.load import import_folder
from megatron_mm.hf.weight_map import Rows, Target
from megatron_mm.modalities import BY_KIND
from megatron_mm.model.initialize import draw_normal, name_in_whole_model
from megatron_mm.shards import open_shards
from megatron_mm.training import checkpoints
from megatron_mm.training.initial_weights import load_initial_weights
from megatron_mm.training.state import TrainState, build_state
from megatron_mm.training.step import run_micro_batches, train_step

GATE = 1e-4
"""Largest difference of a logit in FP32; right maps give below 1e-5, one wrong tensor more than 0.1."""
SAMPLES = [0, 3, 5, 9]
SEEDS = [1, 2]
FORMS = {"ls960": "tp=2 pp=2", "lv60k": "tp=2 pp=2"}


def stir(state: TrainState, seed: int) -> None:
    """Add noise to every parameter, norms and biases too, that depends on its name and global index alone."""
    mesh = state.mesh
    for chunk in state.chunks:
        for name, parameter in chunk.named_parameters():
            noise = torch.empty_like(parameter.data)
            noise.tensor_model_parallel = getattr(parameter, "tensor_model_parallel", False)
            if noise.tensor_model_parallel:
                noise.partition_dim, noise.partition_stride = parameter.partition_dim, parameter.partition_stride
            rank, size = (mesh.tp_rank, mesh.tp_size) if noise.tensor_model_parallel else (0, 1)
            key = hash((seed, *name_in_whole_model(chunk, name).encode()))
            draw_normal(noise, std=0.1, key=key, tp_rank=rank, tp_size=size)
            parameter.data += noise


def save_and_run(config: Config, seeds: list[int]) -> list[list[Tensor]] | None:
    """Save a checkpoint for each seed, and return the logits of SAMPLES on the last stage: each (seq_len, vocab)."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    train_step(state, loader.step(0))
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, outputs: tuple[Tensor, None]) -> None:
        logits = outputs[0].detach().squeeze(1).clone()  # the loss destroys them
        seen.append(gather_from_tensor_model_parallel_region(logits, mesh.tp_group))

    if state.chunks[-1].post_process:
        state.chunks[-1].output_layer.register_forward_hook(keep)
    for seed in seeds:
        stir(state, seed)
        state.step = seed
        checkpoints.save(state)
        with torch.no_grad():
            run_micro_batches(state, loader.micro_batches(np.asarray(SAMPLES)), forward_only=True)
    number = len(SAMPLES)
    return [seen[start : start + number] for start in range(0, len(seen), number)] or None


@pytest.fixture(scope="module", params=FORMS)
def trained(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Checkpoints of a TP2 x PP2 run with the logits that it computed, and their exports."""
    folder = tmp_path_factory.mktemp(request.param)
    seeds = SEEDS if request.param == "ls960" else SEEDS[:1]
    form = [f"audio.form={request.param}", "checkpoint.interval=1", "checkpoint.keep=9", "training.global_batch_size=4"]
    config = small_config(shards, folder / "run", *form, *layout(FORMS[request.param]))
    logits = run_ranks(4, save_and_run, config, seeds)[-1]
    return {"config": config, "logits": dict(zip(seeds, logits)), "folder": folder}


def exported(trained: dict[str, Any], seed: int, name: str = "out", **options: Any) -> Path:
    """Return the exports of a checkpoint, made at the first call."""
    out = trained["folder"] / f"{name}_{seed}"
    if not out.exists():
        path = checkpoints.folder(trained["config"]) / f"step_{seed:08d}"
        export(path, out, tokenizer_path=tokenizer_of(trained["config"]), options=Options(**options))
    return out


def tokenizer_of(config: Config) -> Path:
    return Path(config.data.train[0]).parent / "tokenizer.json"


def pieces(config: Config) -> Iterator[tuple[int, slice, dict[str, Tensor]]]:
    """Yield (sample, where it stands, model inputs) of each piece of a document in SAMPLES."""
    (shard,) = open_shards(config.data.train)
    plan = plan_packing([shard], seq_len=config.data.seq_len)
    for number, sample in enumerate(SAMPLES):
        position = 0
        for piece in plan.sample(sample):
            document, start, length = int(piece["document"]), int(piece["start"]), int(piece["length"])
            items = [item for item in shard.media(document) if 0 <= int(item["token_offset"]) - start < length]
            media = [(BY_KIND[int(item["kind"])].name, shard.media_bytes(item)) for item in items]
            tokens = shard.tokens(document, start, start + length)
            inputs = export_inputs(tokens, media, config.encoders)
            yield number, slice(position, position + length), inputs
            position += length


MEDIA = {"text": set(), "image": {"pixel_values"}, "full": {"pixel_values", "input_values", "input_values_mask"}}
AUTO = {"text": AutoModelForCausalLM, "image": AutoModelForImageTextToText, "full": AutoModelForMultimodalLM}


def load(folder: Path) -> torch.nn.Module:
    """Return the model of an export, of which no key is missing or unexpected."""
    auto = AUTO[folder.name]
    model, info = auto.from_pretrained(folder, output_loading_info=True, trust_remote_code=folder.name == "full")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def difference(trained: dict[str, Any], seed: int, folder: Path) -> tuple[float, list[frozenset[str]]]:
    """Return the largest difference of a logit, and which media the pieces had that an export could be given."""
    model = load(folder)
    largest, kinds = 0.0, []
    for number, place, inputs in pieces(trained["config"]):
        media = frozenset(inputs) - {"input_ids"}
        if not media <= MEDIA[folder.name]:
            continue
        with torch.no_grad():
            found = model(**inputs).logits[0]
        expected = trained["logits"][seed][number][place]
        assert expected.std() > 0.3  # the model says something
        largest = max(largest, (found - expected).abs().max().item())
        kinds.append(media)
    return largest, kinds


def test_logits_of_each_export_are_those_of_the_training_model(trained: dict[str, Any]) -> None:
    seen = set()
    for seed in trained["logits"]:
        for kind in KINDS:
            largest, kinds = difference(trained, seed, exported(trained, seed) / kind)
            print(f"seed {seed} {kind}: {largest:.2e}")
            assert largest < GATE, (seed, kind)
            seen |= set(kinds)
    audio = frozenset({"input_values", "input_values_mask"})
    assert {frozenset(), frozenset({"pixel_values"}), audio} <= seen


def swapped(targets: list[Target], first: str, second: str) -> list[Target]:
    """Exchange what two tensors of layer 2 are made of."""
    names = {target.name: target for target in targets}
    one, two = (next(n for n in names if f"layers.2.{part}" in n) for part in (first, second))
    other = {one: names[two].rows, two: names[one].rows}
    return [Target(t.name, other.get(t.name, t.rows), t.plus, t.fill_like, t.fill) for t in targets]


def permuted(targets: list[Target]) -> list[Target]:
    """Turn the rows of one query weight: the heads stand in another order."""
    result = []
    for target in targets:
        rows = target.rows
        if "layers.2.self_attn.q_proj" in target.name:
            (own,) = rows
            rows = (Rows(own.source, 8, own.stop), Rows(own.source, 0, 8))
        result.append(Target(target.name, rows, target.plus, target.fill_like, target.fill))
    return result


WRONG_MAPS = {
    "gate-up": lambda targets: swapped(targets, "mlp.gate_proj", "mlp.up_proj"),
    "key-value": lambda targets: swapped(targets, "self_attn.k_proj", "self_attn.v_proj"),
    "norms": lambda targets: swapped(targets, "input_layernorm", "post_attention_layernorm"),
    "heads": permuted,
}


@pytest.mark.parametrize("trained", ["ls960"], indirect=True, scope="module")
@pytest.mark.parametrize("wrong", WRONG_MAPS)
def test_the_gate_finds_a_wrong_map(wrong: str, trained: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = weight_map.decoder
    monkeypatch.setattr(weight_map, "decoder", lambda *a, **k: iter(WRONG_MAPS[wrong](list(right(*a, **k)))))
    out = exported(trained, 1, name=wrong, kinds=("text",))
    assert difference(trained, 1, out / "text")[0] > 100 * GATE


def start_and_go_on(config: Config) -> None:
    """Save what a run starts from as step 1, and what one step makes of it as step 2."""
    mesh = meshes.cut(config)
    loader = Loader(config.data.train, config=config, mesh=mesh)
    state = build_state(config, mesh)
    train_step(state, loader.step(0))  # there is nothing of the optimizer to save before
    load_initial_weights(state)
    checkpoints.save(state)
    train_step(state, loader.step(0))
    checkpoints.save(state)


@pytest.mark.parametrize("trained", ["ls960"], indirect=True, scope="module")
@pytest.mark.parametrize(
    ("text", "ranks"), [("tp=4", 4), ("pp=2 vpp=2", 2), ("tp=2 pp=2", 4), ("tp=2 cp=2", 4), (" ", 2)]
)
def test_a_run_that_starts_from_an_export_holds_its_weights(
    text: str, ranks: int, trained: dict[str, Any], shards: Path, tmp_path: Path
) -> None:
    original = exported(trained, 1)
    preset = checkpoints.folder(trained["config"]) / "step_00000001" / "config.yaml"
    settings = ["parallel.tp=1", "parallel.pp=1", f"run_dir={tmp_path / 'run'}"]
    config = import_folder(original / "full", tmp_path / "start", preset=str(preset), overrides=settings)
    parallel = small_config(shards, "unused", *layout(text)).parallel
    config = config.model_copy(update={"parallel": parallel})
    run_ranks(ranks, start_and_go_on, config)
    for step, largest in ((1, 0.0), (2, 0.05)):
        path = checkpoints.folder(config) / f"step_{step:08d}"
        export(path, tmp_path / f"out_{step}", tokenizer_path=tokenizer_of(config), options=Options(kinds=("full",)))
        for file in sorted((original / "full").glob("*.safetensors")):
            before, after = load_file(file), load_file(tmp_path / f"out_{step}" / "full" / file.name)
            assert before.keys() == after.keys()
            differences = [(after[name] - value).abs().max().item() for name, value in before.items()]
            assert max(differences) <= largest, file.name
            if step == 1:
                assert file.read_bytes() == (tmp_path / "out_1" / "full" / file.name).read_bytes()


def as_llama_of(config: Config, seed: int) -> dict[str, Tensor]:
    """Return transformers' weights of a checkpoint, loaded by megatron-core on one rank and mapped by hand."""
    state = build_state(config, meshes.cut(config))
    checkpoints.load(state, checkpoints.folder(config) / f"step_{seed:08d}")
    return as_llama(state.chunks[0], config).state_dict()


def test_tensors_are_those_of_the_checkpoint_to_the_bit(trained: dict[str, Any], shards: Path) -> None:
    alone = trained["config"].model_copy(update={"parallel": small_config(shards, "unused").parallel})
    (expected,) = run_ranks(1, as_llama_of, alone, 1)
    found: dict[str, Tensor] = {}
    for file in (exported(trained, 1) / "text").glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    index = json.loads((exported(trained, 1) / "text" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == expected.keys()

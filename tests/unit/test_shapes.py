"""What a model is made of, from its settings alone, and how other tensors differ from it."""

import pytest
from launch import run_alone
from small import SMALL

from megatron_mm import config as configs
from megatron_mm.model.shapes import compare_shapes, tensor_shapes


def built(preset: str, overrides: list[str]) -> dict[str, tuple[int, ...]]:
    from megatron_mm.model.accounting import build_on_meta

    model = build_on_meta(configs.load(preset, overrides))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("tiny", []),
        ("tiny", [*SMALL, "model.qk_norm=true", "model.num_query_groups=2", "audio.form=lv60k", "parallel.tp=2"]),
        ("mm_88b", ["audio.form=ls960"]),
    ],
)
def test_they_are_those_of_the_built_model(preset: str, overrides: list[str]) -> None:
    assert tensor_shapes(configs.load(preset, overrides)) == run_alone(built, preset, overrides)


def test_every_difference_is_listed_with_equal_layers_together() -> None:
    found = tensor_shapes(configs.load("tiny", ["image.num_layers=4", "model.qk_norm=true", "model.head_dim=16"]))
    expected = tensor_shapes(configs.load("tiny", ["audio.num_layers=3"]))
    lacks, has, *shapes = compare_shapes(found, expected)
    assert lacks.startswith(
        "it lacks embedding.audio.encoder.tower.encoder.layers.2.* (16 tensors a layer) (see audio."
    )
    assert "embedding.image.encoder.tower.layers.2-3.* (16 tensors a layer)" in has
    assert "decoder.layers.0-5.self_attention.key_norm.weight" in has and "(see image." in has and "model." in has
    assert "(64, 128) in it, (128, 128) in the model: decoder.layers.0-5.self_attention.linear_q.weight" in shapes[1]
    assert compare_shapes(expected, expected) == []

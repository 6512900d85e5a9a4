"""What a preset amounts to, counted from the modules that it builds."""

import json

import pytest
from launch import run_command


def describe(*arguments: str) -> dict:
    ended = run_command(*arguments, "--describe")
    assert ended.status == 0, ended.stderr
    assert len(ended.stdout.splitlines()) == 1
    return json.loads(ended.stdout)


def test_mm_88b_has_the_published_parameters() -> None:
    described = describe("mm_88b", "--world-size", "1024")  # on meta: memory for 88B could not be had here
    counts = described["parameters"]
    assert counts["total"] == 88_579_350_656
    assert counts["decoder"] == 86_970_703_872
    assert counts["token_embedding"] == counts["head"] == 51_200 * 8_192
    assert counts["image_tower"] == 303_301_632  # timm's vit_large_patch16_224 without its classifier
    assert counts["audio_tower"] == 315_427_968  # torchaudio's wav2vec2_large
    assert described["trainable_parameters"] == counts["total"] - 2 * 1_024  # the norm that a projector starts from
    assert described["layout"] == {"ranks": 1024, "tp": 8, "pp": 4, "vpp": 7, "cp": 1, "dp": 32}
    assert described["tokens_per_step"] == 4_194_304
    assert described["micro_batches_per_step"] == 16
    assert described["tokens_of_the_run"] == pytest.approx(2e12, rel=1e-6)
    stages = described["layers_by_stage"]
    assert [len(stage) for stage in stages] == [7] * 4
    assert [len(chunk) for chunk in stages[0]] == [3, 4, 4, 4, 4, 4, 4]  # the embedding takes a slot
    assert [len(chunk) for chunk in stages[3]] == [4, 4, 4, 4, 4, 4, 3]  # so does the loss
    order = [layer for chunk in range(7) for stage in stages for layer in stage[chunk]]
    assert order == list(range(110))


def test_the_encoders_fit_into_the_slot_of_the_embedding() -> None:
    """Priced by hand: a ViT-L/16 does 2 x 302M x 197 FLOPs an image and 4 x 24 x 197^2 x 1024 in its attention."""
    price = describe("mm_88b")["encoders_in_layers"]
    tower = 2 * 302.3e6 * 197 + 4 * 24 * 197**2 * 1024
    projector = 2 * (1024 * 8192 + 8192**2) * 198
    layer = 3 * 8192 * (2 * 790.6e6 + 2 * 8192**2)
    assert price["image"] == pytest.approx(3 * (tower + projector) / layer, rel=0.02)
    assert price["images_only"] == pytest.approx(price["image"] * 41, rel=0.02)
    assert max(price["images_only"], price["seconds_only"]) < 1.0
    frozen = describe("mm_88b", "image.trainable=false")["encoders_in_layers"]
    assert frozen["image"] == pytest.approx((tower + 3 * projector) / layer, rel=0.02)
    assert frozen["second"] == price["second"]


def test_the_libri_light_form_is_larger_by_its_norms_and_biases() -> None:
    counts = describe("mm_88b", "audio.form=lv60k")["parameters"]
    assert counts["audio_tower"] == 315_437_696  # torchaudio's wav2vec2_large_lv60k
    assert counts["total"] == 88_579_350_656 + 9_728


def test_frozen_towers_stay_as_they_are_and_their_projectors_learn() -> None:
    counts = (described := describe("mm_1b", "image.trainable=false", "audio.trainable=false"))["parameters"]
    assert sum(counts.values()) == 2 * counts["total"]
    assert all(counts.values())
    assert described["trainable_parameters"] == counts["total"] - counts["image_tower"] - counts["audio_tower"]


def test_tiny_trains_all_but_the_norm_that_a_projector_starts_from() -> None:
    counts = (described := describe("tiny"))["parameters"]
    assert sum(counts.values()) == 2 * counts["total"]
    assert all(counts.values())
    assert described["trainable_parameters"] == counts["total"] - 2 * 64

"""Settings: presets, overrides, and what a user reads when one is wrong."""

from pathlib import Path

import pytest

from megatron_mm import config as configs
from megatron_mm.config.rules import start_failures, world_failures
from megatron_mm.errors import ConfigError


@pytest.mark.parametrize("preset", ["tiny", "mm_1b", "mm_88b", "mm_88b_fp8"])
def test_every_preset_loads(preset: str) -> None:
    assert preset in configs.preset_names()
    assert configs.load(preset).preset == preset


def test_the_88b_is_the_published_one() -> None:
    config = configs.load("mm_88b")
    assert (config.model.num_layers, config.model.hidden_size, config.model.num_attention_heads) == (110, 8192, 64)
    assert (config.model.num_query_groups, config.model.head_dim, config.data.seq_len) == (1, 128, 8192)
    assert config.tokens_per_step == 4_194_304
    assert config.tokens_per_step * config.training.steps == pytest.approx(2e12, rel=1e-6)


def test_an_override_is_typed_by_the_schema() -> None:
    config = configs.load(
        "tiny", ["optimizer.lr=2e-3", "data.train=[a, b]", "schedule.decay_steps=null", "parallel.tp=2"]
    )
    assert config.optimizer.lr == 2e-3
    assert config.data.train == ("a", "b")
    assert config.schedule.decay_steps is None
    assert config.parallel.tp == 2


def test_an_unknown_key_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"training\.stepz is not a setting\. Did you mean training\.steps\?"):
        configs.load("tiny", ["training.stepz=3"])
    with pytest.raises(ConfigError, match=r"steps is not a setting\. Did you mean training\.steps\?"):
        configs.load("tiny", ["steps=3"])
    with pytest.raises(ConfigError, match="Did you mean 'mm_88b'"):
        configs.load("mm_8b")


def test_all_failures_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as failure:
        configs.load("mm_88b", ["parallel.tp=3", "parallel.pp=5", "nonsense=1", "schedule.warmup_steps=999999"])
    message = str(failure.value)
    assert "nonsense is not a setting" in message
    assert "parallel.tp=3 does not divide model.num_attention_heads=64. Use tp in [1, 2, 4, 8, 16, 32, 64]" in message
    assert "parallel.pp=5 x vpp=7 does not divide the 112 slots" in message
    assert "schedule.warmup_steps=999999" in message


def test_ill_typed_values_name_their_key_and_what_was_found() -> None:
    with pytest.raises(ConfigError) as failure:
        configs.load("tiny", ["model.num_layers=six", "parallel.tp=0", "training.precision=fp7"])
    message = str(failure.value)
    for part in ("model.num_layers", "'six'", "parallel.tp", "training.precision", "'fp7'"):
        assert part in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("no_equals", "is not an override"),
        ("parallel.tp=[", "not YAML"),
        ("model.head_dim=15", "is odd"),
        ("model.num_query_groups=3", "does not divide model.num_attention_heads"),
        ("parallel.vpp=2", "needs more than one pipeline stage"),
        ("optimizer.min_lr=1.0", "is above optimizer.lr"),
        ("data.train={}", "which names no shards"),
        ('data.train=["a,"]', "which names no shards"),
        ("data.changes=[{from_step: 3, train: {}}]", r"data\.changes from step 3 is \{\}, which names no shards"),
        ("image.num_attention_heads=5", "does not divide image.hidden_size"),
        ("audio.pos_conv_groups=5", "does not divide audio.hidden_size"),
        ("training.stop_after=141", "training.stop_after=141 is behind the last step, training.steps=140"),
        ("data.changes=[{from_step: 140, train: {a: 1}}]", r"begin at steps \[140\], and the last step is 139"),
        ("checkpoint.keep_every=100", "checkpoint.keep_every=100 is no multiple of checkpoint.interval=70"),
    ],
)
def test_each_rule_says_what_is_wrong(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.load("tiny", [override])


def test_a_window_of_one_loss_that_would_find_no_spike_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"guard\.spike_window=1 keeps one loss"):
        configs.load("tiny", ["guard.spike_window=1"])


def test_storage_is_not_tried_again_for_longer_than_a_rank_may_stand_still() -> None:
    with pytest.raises(ConfigError, match=r"guard\.retry_minutes=10 .* guard\.hang_seconds=600"):
        configs.load("tiny", ["guard.hang_seconds=600"])
    assert configs.load("tiny", ["guard.hang_seconds=0"]).guard.retry_minutes == 10
    configs.load("tiny", ["guard.spike_window=2"])


@pytest.mark.parametrize(
    ("without", "settings"),
    [
        ("training.precision=bf16", ["training.fp8_recipe=blockwise", "training.bf16_end_layers=2"]),
        ("optimizer.weight_decay=0", ["optimizer.decay_embeddings=true"]),
        ("data.prefetch_steps=0", ["data.stall_seconds=30"]),
        ("guard.spike_window=0", ["guard.spike_deviations=5", "guard.spike_steps=2", "guard.spike_nats=1"]),
        ("guard.slow_rank_interval=0", ["guard.slow_rank_ratio=3"]),
    ],
)
def test_what_would_have_no_effect_is_refused(without: str, settings: list[str]) -> None:
    configs.load("tiny", [without])
    for setting in settings:
        key = setting.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"{key}=\S+ has no effect without .* Set that, or {key}="):
            configs.load("tiny", [without, setting])


def test_a_style_that_does_not_decay_or_never_ends_refuses_what_it_would_not_heed() -> None:
    configs.load("tiny", ["schedule.style=constant", "optimizer.min_lr=2e-5", "optimizer.lr=1e-5"])
    with pytest.raises(
        ConfigError, match=r"optimizer\.min_lr=0\.0003 has no effect without a schedule\.style that decays"
    ):
        configs.load("tiny", ["schedule.style=constant"])
    for style, fitting in (("constant", ["optimizer.min_lr=2e-5"]), ("inverse_sqrt", [])):
        chosen = [f"schedule.style={style}", *fitting]
        configs.load("tiny", chosen)
        with pytest.raises(
            ConfigError, match=r"schedule\.decay_steps=90 has no effect without schedule\.style=cosine or"
        ):
            configs.load("tiny", [*chosen, "schedule.decay_steps=90"])


def test_layers_dealt_by_hand_do_not_make_chunks_of_one_stage() -> None:
    slots = ["parallel.embedding_slot=false", "parallel.loss_slot=false"]
    with pytest.raises(ConfigError, match=r"parallel\.vpp=2 needs more than one pipeline stage"):
        configs.load("tiny", ["parallel.vpp=2", "parallel.stage_layers=[3, 3]", *slots])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.backend=local"], r"training\.precision=fp8 is TransformerEngine's"),
        (["training.backend=local"], r"parallel\.tp_comm_overlap=true is TransformerEngine's"),
        (["parallel.tp=1"], r"parallel\.tp_comm_overlap=true overlaps communication of tensor ranks"),
        (["training.fp8_recipe=delayed"], r"Use training\.bf16_end_layers=0"),
        (["training.bf16_end_layers=56"], "leaves none of model.num_layers=110"),
        (["training.bf16_end_layers=55"], "leaves none of model.num_layers=110"),
        (["model.ffn_hidden_size=26632"], r"model\.ffn_hidden_size / parallel\.tp=3329 is not a multiple of 16"),
        (
            ["training.fp8_recipe=blockwise", "model.ffn_hidden_size=26752"],
            r"model\.ffn_hidden_size / parallel\.tp=3344 is not a multiple of 128",
        ),
        (["parallel.overlap_grad_reduce=false"], r"needs parallel\.overlap_grad_reduce=true"),
    ],
)
def test_each_rule_of_the_big_runs_says_what_is_wrong(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.load("mm_88b_fp8", overrides)


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_the_88b_fits_every_fp8_recipe(recipe: str) -> None:
    configs.load("mm_88b_fp8", [f"training.fp8_recipe={recipe}"])
    configs.load("mm_88b_fp8", ["training.fp8_recipe=delayed", "training.bf16_end_layers=0"])


@pytest.mark.parametrize("preset", ["mm_1b", "mm_88b", "mm_88b_fp8"])
def test_the_encoders_of_the_big_presets_are_fine_tuned_from_files_that_the_user_names(preset: str) -> None:
    config = configs.load(preset)
    assert config.image.trainable and config.audio.trainable
    assert config.audio.form == "ls960"  # Wav2Vec 2.0 Large as pretrained on Librispeech
    lacking = start_failures(config)
    assert len(lacking) == 2
    for name, said in zip(("image", "audio"), lacking):
        assert said.startswith(f"{name}.pretrained is not given")
        assert "training.start_from=CHECKPOINT" in said and f"{name}.pretrained=random" in said
    with pytest.raises(ConfigError, match=r"audio\.pretrained is not given"):
        configs.check_start(configs.load(preset, ["image.pretrained=vit.pth"]))
    for given in (["image.pretrained=vit.pth", "audio.pretrained=random"], ["training.start_from=runs/a/step_1"]):
        configs.check_start(configs.load(preset, given))


@pytest.mark.parametrize("name", ["image", "audio"])
@pytest.mark.parametrize("others", [(), ("training.start_from=runs/a/step_1",)], ids=str)
def test_an_encoder_that_is_random_and_frozen_is_refused_always(name: str, others: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=rf"{name}\.pretrained=random and {name}\.trainable=false are an encoder"):
        configs.load("mm_88b", [f"{name}.pretrained=random", f"{name}.trainable=false", *others])
    configs.load("mm_88b", [f"{name}.pretrained=vit.pth", f"{name}.trainable=false", *others])


def test_the_settings_of_a_run_that_named_no_encoders_can_still_be_read(tmp_path: Path) -> None:
    """As runs were saved before `pretrained` had to be given: frozen, and null."""
    before = configs.load("mm_1b", ["image.trainable=false", "audio.trainable=false", f"run_dir={tmp_path}"])
    assert configs.load(str(configs.save(before))) == configs.anchor(before)
    with pytest.raises(ConfigError, match=r"image\.pretrained is not given"):
        configs.check_start(before)


def test_a_preset_may_start_from_another(tmp_path: Path) -> None:
    fp8, bf16 = configs.load("mm_88b_fp8"), configs.load("mm_88b")
    saves = {"checkpoint.interval", "checkpoint.keep_every", "training.check_replicas_interval"}
    assert configs.differences(bf16, fp8).keys() == {"preset", "run_dir", "training.precision", *saves}
    assert all(one.checkpoint.keep_every % one.checkpoint.interval == 0 for one in (bf16, fp8))
    path = tmp_path / "mine.yaml"
    path.write_text("extends: mm_88b_fp8\nrun_dir: runs/mine\noptimizer: {lr: 1.0e-4}\n")
    mine = configs.load(str(path))
    assert configs.differences(fp8, mine).keys() == {"preset", "run_dir", "optimizer.lr"}
    path.write_text("extends: mm_88\n")
    with pytest.raises(ConfigError, match="Did you mean 'mm_88b'"):
        configs.load(str(path))


def test_groups_and_tensor_ranks_must_divide_one_another() -> None:
    overrides = [
        "model.num_attention_heads=12",
        "model.num_query_groups=6",
        "parallel.tp=4",
        "model.ffn_hidden_size=48",
    ]
    with pytest.raises(ConfigError, match=r"model\.num_query_groups=6 and parallel\.tp=4 must divide one another"):
        configs.load("tiny", overrides)


def test_the_number_of_ranks_must_fit() -> None:
    tiny = configs.load("tiny", ["parallel.tp=2", "parallel.pp=2"])
    assert world_failures(tiny, 4) == []
    assert "6 ranks cannot be cut into replicas of parallel.tp=2 x cp=1 x pp=2 = 4 ranks" in world_failures(tiny, 6)[0]
    assert "training.global_batch_size" in world_failures(tiny, 4 * 3)[0]
    interleaved = configs.load("tiny", ["parallel.pp=4", "parallel.vpp=2", "training.global_batch_size=4"])
    assert "micro-batches of a step to be a multiple of parallel.pp=4" in world_failures(interleaved, 4)[0]


def test_a_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = configs.load("tiny", ["optimizer.lr=0.002", f"run_dir={tmp_path}"])
    path = configs.save(config)
    assert configs.load(str(path)) == configs.anchor(config)
    assert configs.anchor(config).data.train == (str(Path.cwd() / "build/sample_data/train"),)
    assert configs.changes(config) == [f"run_dir: runs/tiny -> {tmp_path}", "optimizer.lr: 0.003 -> 0.002"]


def test_a_configuration_is_frozen() -> None:
    config = configs.load("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3


def test_every_field_is_explained() -> None:
    fields = list(configs.describe_fields())
    assert len(fields) > 50
    for key, kind, default, explanation in fields:
        assert explanation.endswith("."), key
        assert kind, key
        assert default, key


def test_a_blend_is_weights_by_dataset_and_may_change_on_the_way() -> None:
    changes = "data.changes=[{from_step: 10, train: {a: 1, c: 1}}, {from_step: 20, train: {c: 1}}]"
    config = configs.load("tiny", ['data.train={a: 0.7, "b,d": 0.3}', changes])
    assert config.data.train_datasets == ["a", "b,d", "c"]
    assert configs.load("tiny", ["data.train=[a, b]"]).data.train_datasets == ["a,b"]
    with pytest.raises(ConfigError, match=r"begin at steps \[3, 3\]"):
        configs.load(
            "tiny", ["data.train=[a]", "data.changes=[{from_step: 3, train: {b: 1}}, {from_step: 3, train: {c: 1}}]"]
        )

"""Another image encoder is one file and preset values: the whole way, from a pretrained folder to generation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from house import House
from small import SMALL, png, write_shards
from transformers import Dinov2Config, Dinov2Model

SETTINGS = (
    *SMALL,
    *("image.encoder=dinov2", "image.image_size=56", "image.patch_size=14", "image.trainable=true"),
    *("audio.trainable=true", "audio.pretrained=random", "training.steps=3", "training.global_batch_size=4"),
    "data.validation=[]",
)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    house = House.build(tmp_path_factory.mktemp("house"))
    house.add("dinov2.py", "modalities/image/towers/dinov2.py")
    return house


@pytest.fixture(scope="module")
def theirs(house: House) -> Dinov2Model:
    """A small DINOv2 as transformers writes it, in the folder `dinov2`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    model = Dinov2Model(Dinov2Config(**sizes, image_size=56, patch_size=14)).eval()
    model.save_pretrained(house.folder / "dinov2")
    return model


@pytest.fixture(scope="module")
def shards(house: House) -> Path:
    """Shards whose images are 16 tokens each."""
    from megatron_mm import config as configs

    geometries = configs.geometries(configs.load("tiny", ["image.image_size=56", "image.patch_size=14"]))
    return write_shards(house.folder / "shards", geometries=geometries)


def train(house: House, shards: Path, run: str, *more: str, ranks: int = 1) -> list[dict]:
    """Return what each step measures."""
    pretrained = f"image.pretrained={house.folder / 'dinov2'}"
    places = [f"data.train=[{shards}]", f"run_dir={house.folder / run}", pretrained]
    house.train(*SETTINGS, *places, "checkpoint.interval=1", *more, ranks=ranks)
    return [record for record in records(house, run) if "grad_norm" in record]


def records(house: House, run: str) -> list[dict]:
    return [json.loads(line) for line in (house.folder / run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tensor(house: House, theirs: Dinov2Model, shards: Path) -> list[dict]:
    """What three steps of two tensor ranks measure."""
    return train(house, shards, "tensor", "parallel.tp=2", ranks=2)


def to_dinov2(pixels: torch.Tensor) -> torch.Tensor:
    """Normalise pixels in [0, 1] as DINOv2's own processor does."""
    mean, deviation = (torch.tensor(own).view(3, 1, 1) for own in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels - mean) / deviation


def test_its_features_are_its_librarys(house: House, theirs: Dinov2Model) -> None:
    images = torch.randint(0, 256, (2, 3, 56, 56), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        pixels = to_dinov2(images.float() / 255)
        expected = theirs(pixels).last_hidden_state[:, 1:].flatten(0, 1)
    torch.save((images, expected), house.folder / "features.pt")
    house.run(
        "-c",
        "import torch; from pathlib import Path; from megatron_mm import config as configs\n"
        "from megatron_mm.modalities import BY_NAME; from megatron_mm.modalities.pretrained import load_tower\n"
        f"section = configs.load('tiny', {[s for s in SETTINGS if s.startswith(('image', 'model'))]}"
        " + ['image.pretrained=x']).image\n"
        "encoder = BY_NAME['image'].part('encoder').Encoder(section).eval()\n"
        "load_tower(encoder.tower, encoder.family, Path('dinov2'), name='image')\n"
        "images, expected = torch.load('features.pt')\n"
        "torch.testing.assert_close(encoder(tuple(images)).detach(), expected, rtol=1e-5, atol=1e-5)",
    )


def test_it_trains_in_two_layouts_and_goes_on_in_the_other(house: House, tensor: list[dict], shards: Path) -> None:
    train(house, shards, "resumed", "training.stop_after=1")
    resumed = train(house, shards, "resumed", "parallel.pp=2", ranks=2)
    starts = [record["step"] for record in records(house, "resumed") if "layout" in record]
    assert starts == [0, 1], "the second run goes on from the first"
    for one, other in zip(tensor, resumed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_it_is_exported_and_generates(house: House, tensor: list[dict]) -> None:
    checkpoint, out = house.folder / "tensor" / "checkpoints" / "step_00000003", house.folder / "export"
    house.tool("convert_checkpoint", "to-hf", str(checkpoint), str(out), "--full", "--gate")
    assert json.loads((out / "full" / "config.json").read_text())["vision_config"]["model_type"] == "dinov2"
    (house.folder / "picture.png").write_bytes(png(np.random.default_rng(0)))
    prompt = ("--file", str(house.folder / "picture.png"), "--text", "the")
    said = house.tool("generate", str(out / "full"), *prompt, "--max-new-tokens", "16", "--temperature", "1")
    assert said.strip()

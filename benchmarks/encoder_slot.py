"""What trained encoders cost on the first stage of the 88B: time in decoder layers, and memory.

    python benchmarks/encoder_slot.py

parallel.embedding_slot leaves out one layer of the first stage for them. FLOPs are counted from the built modules, as
`--describe` does. Time is priced by the planner's model of a GPU, product by product, for products so narrow are bound
by launches and memory: the layers of both encoders and their projectors, forward and backward, beside a decoder layer
of the same micro-batch. The convolutions under Wav2Vec 2.0 are taken at half of the products' speed, which is assumed.
Memory is what autograd keeps of an image and of a second, times the micro-batches that the first chunk has in flight.

The bar: where each rank has an image and a second, less than 1.4 layers. Up to there the preset's deal is the fastest
one of whole layers: only the last stage could take another, and its head takes 0.4 of a layer's time or more.
"""

import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from verdict import finish

from megatron_mm import config as configs
from megatron_mm.config import Config
from megatron_mm.modalities.audio.spec import AUDIO, audio_frames
from megatron_mm.modalities.image.spec import IMAGE
from megatron_mm.model.accounting import build_on_meta, encoder_price
from megatron_mm.planning.cost import GPUS, Gpu, Layout, layer_seconds, linear_seconds
from megatron_mm.planning.layouts import RATES, shape_of
from megatron_mm.planning.timeline import order

RANKS = 8
"""Tensor (and context) ranks over which images and seconds are dealt, in the preset and in the plans."""
BAR = 1.4
JOBS = (("a100-80", "bf16"), ("h100-80", "bf16"), ("h100-80", "fp8"))
CONVOLUTION_SPEED = 0.5
"""Of the speed of large products; not measured."""
MIXED = "an image and a second each"


def layout_of(config: Config, precision: str) -> Layout:
    """Return the preset's layout on 1,024 GPUs."""
    cut = config.parallel
    return Layout(cut.tp, cut.pp, cut.vpp, cut.cp, 1024 // cut.ranks_per_replica, 1, 512, precision)


def tower_seconds(encoder, *, tokens: int, attended: int, gpu: Gpu) -> float:
    """Return the seconds that the transformer of an encoder takes, forward and backward, on `tokens` of one rank."""
    rate, width, ffn = RATES[gpu.name], encoder.hidden_size, encoder.ffn_hidden_size
    products = [(width, width)] * 4 + [(width, ffn), (ffn, width)]
    linear = sum(sum(linear_seconds(tokens, *sizes, gpu=gpu, rate=rate)) for sizes in products)
    attention = 3.5 * 4 * tokens * attended * width / (gpu.bf16_flops * rate.attention)
    moved = 3 * 2 * tokens * (10 * width + 4 * ffn) / (gpu.hbm_bytes * rate.memory)
    return encoder.num_layers * (linear + attention + moved)


def seconds(config: Config, convolutions: float, *, images: int, sounds: int, gpu: Gpu) -> float:
    """Return what so many images and seconds of sound take on one rank, forward and backward. Without any, both towers
    still run once, so that every rank has gradients."""
    rate, found = RATES[gpu.name], 0.0
    units = ((config.image, images, 196 + 1), (config.audio, sounds, audio_frames(16_000)))
    for encoder, count, tokens in units:
        found += tower_seconds(encoder, tokens=max(count, 1) * tokens, attended=tokens, gpu=gpu)
        for sizes in ((encoder.hidden_size, config.model.hidden_size), (config.model.hidden_size,) * 2):
            found += sum(linear_seconds(max(count, 1) * tokens, *sizes, gpu=gpu, rate=rate))
    return found + 3 * max(sounds, 1) * convolutions / (gpu.bf16_flops * rate.products * CONVOLUTION_SPEED)


def kept_bytes(encoder: nn.Module, unit: torch.Tensor) -> int:
    """Return the bytes that autograd keeps of the pass of one image or second, weights left out."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = encoder((unit,))  # holds on to what is kept: no storage is used twice
    assert features.requires_grad
    weights = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    return sum(size for place, size in kept.items() if place not in weights)


def in_flight(layout: Layout) -> int:
    """Return of how many micro-batches the first chunk keeps activations at most."""
    held = most = 0
    for backward, chunk, _ in order(pp=layout.pp, vpp=layout.vpp, num_micro_batches=layout.num_micro_batches, stage=0):
        held += (1 - 2 * backward) * (chunk == 0)
        most = max(most, held)
    return most


def main() -> None:
    """Print the prices and end with the verdict."""
    config = configs.load("mm_88b")
    model = build_on_meta(config)
    print("decoder layers by FLOPs:", encoder_price(config, model))
    second = torch.empty(16_000, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.embedding.audio.encoder.tower.feature_extractor(second[None].bfloat16())
    num_tokens, sound = config.tokens_per_micro_batch, audio_frames(16_000)
    all_images, all_sound = (math.ceil(num_tokens // tokens / RANKS) for tokens in (196 + 2, sound))
    mixes = {"text only": (0, 0), MIXED: (1, 1), "images only": (all_images, 0)}
    mixes |= {"sound only": (0, all_sound)}
    largest = 0.0
    for name, precision in JOBS:
        gpu, layout = GPUS[name], layout_of(config, precision)
        passes = [layer_seconds(shape_of(config), layout, gpu, RATES[name], backward=b) for b in (False, True)]
        layer = sum(map(sum, passes))
        for mix, (images, sounds) in mixes.items():
            price = seconds(config, counter.get_total_flops(), images=images, sounds=sounds, gpu=gpu) / layer
            largest = max(largest, price if mix == MIXED else 0.0)
            print(f"{name} {precision}: {mix} ({images} images, {sounds} s a rank): {price:.2f} layers by time")
    deep = in_flight(layout_of(config, "bf16"))
    for modality, count in ((IMAGE, all_images), (AUDIO, all_sound)):
        encoder = modality.part("encoder").Encoder
        section = config.encoders[modality.name]
        kept = kept_bytes(encoder(section).bfloat16(), torch.zeros_like(encoder.example_unit(section)))
        print(
            f"{kept / 2**20:.0f} MiB kept of one {modality.unit}; x {count} a rank x {deep} micro-batches in flight: "
            f"{kept * count * deep / 2**30:.1f} GiB"
        )
    finish("encoder_slot", ours=largest, peer=BAR, bar=1.0)


if __name__ == "__main__":
    main()

"""What a step of a layout takes on a GPU, from its counts and five constants: a hardware model without torch.

Counts are formulas of the layer's shape. The constants were fitted on a stated part of published runs and are checked
on the rest by benchmarks/planner_accuracy.py.
"""

from dataclasses import dataclass
from itertools import permutations
from math import ceil


@dataclass(frozen=True)
class Gpu:
    """One GPU and what joins it to others, by the maker's figures; rates per second."""

    name: str
    multiprocessors: int
    bf16_flops: float
    fp8_flops: float
    memory_bytes: float
    hbm_bytes: float
    nvlink_bytes: float
    """One direction."""
    network_bytes: float
    """One direction, a GPU."""


GPUS = {
    "a100-80": Gpu("a100-80", 108, 312e12, 312e12, 80 * 2**30, 2.0e12, 300e9, 25e9),
    "h100-80": Gpu("h100-80", 132, 989e12, 1979e12, 80 * 2**30, 3.35e12, 450e9, 50e9),
}

EXPOSED, DATA_EXPOSED = 0.3, 0.1
"""What overlapped tensor and pipeline communication, and that of data parallelism, leave exposed: not fitted."""
TILES = {(256, 128): 1.0, (128, 128): 0.93, (128, 64): 0.8, (64, 64): 0.6}
"""What a multiprocessor multiplies at once, and how fast beside the widest: not fitted."""
IDLE_WAVE, LAUNCH_SECONDS = 0.5, 5e-6
"""The part of its last wave of tiles that a product leaves idle, and the seconds that starting a kernel takes: not
fitted."""


@dataclass(frozen=True)
class Efficiency:
    """What a GPU reaches of its makers' figures; fitted, the same for every model and layout."""

    products: float
    """The part of peak that large matrix products reach."""
    attention: float
    """The part of the BF16 peak that attention reaches."""
    fp8: float = 0.5
    """The part of the FP8 peak that large matrix products reach, casts included."""
    memory: float = 0.8
    links: float = 0.7


@dataclass(frozen=True)
class Shape:
    """A decoder: gated is SwiGLU, three matrices a feed-forward network and not two."""

    num_layers: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    vocab: int
    seq_len: int
    gated: bool

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's matrices."""
        head_dim = self.hidden // self.heads
        return 2 * self.hidden**2 + 2 * self.hidden * self.groups * head_dim + (2 + self.gated) * self.hidden * self.ffn

    @property
    def parameters(self) -> int:
        """The parameters of the decoder, its token embedding and its head."""
        return self.num_layers * self.layer_weights + 2 * self.vocab * self.hidden

    def model_flops(self, sequences: int) -> float:
        """FLOPs of a step by the usual convention: 6 a weight and token, and full, not causal, attention."""
        tokens = sequences * self.seq_len
        attention = 12 * self.num_layers * self.hidden * self.seq_len
        return tokens * (6.0 * (self.num_layers * self.layer_weights + self.vocab * self.hidden) + attention)


@dataclass(frozen=True)
class Layout:
    """How a step is cut."""

    tp: int
    pp: int
    vpp: int
    cp: int
    dp: int
    micro_batch_size: int
    global_batch_size: int
    precision: str
    recompute: str = "none"
    sequence_parallel: bool = True
    flash: bool = True
    overlapped: bool = True

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of one replica in a step."""
        return self.global_batch_size // (self.dp * self.micro_batch_size)

    @property
    def bubble(self) -> float:
        """Idle time of the pipeline as a fraction of its work (Narayanan et al. 2021)."""
        return (self.pp - 1) / (self.vpp * self.num_micro_batches)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, and where they go."""

    layers: float
    head: float
    bubble: float
    tensor_communication: float
    """Exposed: not hidden behind matrix products."""
    pipeline_communication: float
    """Exposed sends between stages."""
    data_communication: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(vars(self).values())


def product_seconds(m: float, n: float, k: float, *, gpu: Gpu, rate: Efficiency, fp8: bool = False) -> float:
    """Return the seconds of an (m, k) by (k, n) matrix product.

    It is cut into tiles of the kind that is soonest done, which the multiprocessors take in waves, the last half idle;
    and is never faster than its operands are read and its result written.
    """
    speed = (gpu.fp8_flops * rate.fp8 if fp8 else gpu.bf16_flops * rate.products) / gpu.multiprocessors
    best = min(
        max(1.0, ceil(m / height) * ceil(n / width) / gpu.multiprocessors + IDLE_WAVE) * 2 * height * width * k / share
        for tile, share in TILES.items()
        for height, width in permutations(tile)
    )
    moved = (1 if fp8 else 2) * (m + n) * k + 2 * m * n
    return max(best / speed, moved / (gpu.hbm_bytes * rate.memory)) + LAUNCH_SECONDS


def matrices(shape: Shape, layout: Layout) -> dict[str, tuple[float, float, float]]:
    """Return (tokens, inputs, outputs) of each matrix of a layer on one tensor rank, for one micro-batch.

    With fewer key/value heads than tensor ranks their matrix is whole on each, which applies it to its share of tokens.
    """
    head_dim, tp, hidden = shape.hidden // shape.heads, layout.tp, shape.hidden
    tokens = layout.micro_batch_size * shape.seq_len / layout.cp
    key_value = 2 * head_dim * shape.groups
    return {
        "query": (tokens, hidden, hidden / tp),
        "key_value": (tokens, hidden, key_value / tp) if shape.groups >= tp else (tokens / tp, hidden, key_value),
        "projection": (tokens, hidden / tp, hidden),
        "fc1": (tokens, hidden, (1 + shape.gated) * shape.ffn / tp),
        "fc2": (tokens, shape.ffn / tp, hidden),
    }


def linear_seconds(
    tokens: float, inputs: float, outputs: float, *, gpu: Gpu, rate: Efficiency, fp8: bool = False
) -> tuple[float, float]:
    """Return the seconds of a linear layer forward, and backward: the gradients of its input and of its weight."""
    own = {"gpu": gpu, "rate": rate, "fp8": fp8}
    forward = product_seconds(tokens, outputs, inputs, **own)
    return forward, product_seconds(tokens, inputs, outputs, **own) + product_seconds(outputs, inputs, tokens, **own)


def layer_seconds(shape: Shape, layout: Layout, gpu: Gpu, rate: Efficiency, *, backward: bool) -> tuple[float, float]:
    """Return the seconds that one layer computes, and communicates exposed, for one micro-batch on one rank."""
    tokens = layout.micro_batch_size * shape.seq_len / layout.cp
    linear = {
        name: linear_seconds(*sizes, gpu=gpu, rate=rate, fp8=layout.precision == "fp8")
        for name, sizes in matrices(shape, layout).items()
    }
    forward, gradients = (sum(seconds) for seconds in zip(*linear.values()))
    pairs = tokens * shape.seq_len / (2 if layout.flash else 1)
    attention = 4 * pairs * shape.hidden / layout.tp / (gpu.bf16_flops * rate.attention)
    spread = layout.tp if layout.sequence_parallel else 1
    # Norms and residuals over the shard; activation functions over the sharded width.
    moved = 2 * tokens * (10 * shape.hidden / spread + 2 * (2 + shape.gated) * shape.ffn / layout.tp)
    if not layout.flash:
        moved += 2 * 5 * layout.micro_batch_size * shape.heads / layout.tp * shape.seq_len**2
    moved_seconds = moved / (gpu.hbm_bytes * rate.memory)
    ring = 4 * 2 * tokens * shape.hidden * (layout.tp - 1) / layout.tp / (gpu.nvlink_bytes * rate.links)
    exposed = ring * (EXPOSED if layout.overlapped and layout.tp > 1 else 1.0)
    if layout.cp > 1:
        width = 4 * shape.groups * shape.hidden // shape.heads / layout.tp
        exposed += 0.5 * tokens * (layout.cp - 1) * width / (gpu.network_bytes * rate.links)
    if not backward:
        return forward + attention + moved_seconds, exposed
    again_attention = attention * (1.25 if layout.flash else 1.0)
    compute = gradients + attention + again_attention + 2 * moved_seconds
    if layout.recompute == "full":
        compute += forward + attention + moved_seconds
        exposed *= 2
    elif layout.recompute == "mlp":
        compute += linear["fc1"][0] + linear["fc2"][0]
    elif layout.recompute == "selective" and not layout.flash:
        compute += attention + 10 * tokens * shape.seq_len * shape.heads / layout.tp / (gpu.hbm_bytes * rate.memory)
    return compute, exposed


def head_seconds(shape: Shape, layout: Layout, gpu: Gpu, rate: Efficiency) -> tuple[float, float]:
    """Return the seconds of the head, forward and backward, for one micro-batch on one rank of the last stage."""
    tokens = layout.micro_batch_size * shape.seq_len / layout.cp
    return linear_seconds(tokens, shape.hidden, shape.vocab / layout.tp, gpu=gpu, rate=rate)


def send_seconds(shape: Shape, layout: Layout, gpu: Gpu, rate: Efficiency) -> float:
    """Return the seconds that a stage sends the activations of one micro-batch to the next, or their gradients."""
    tokens = layout.micro_batch_size * shape.seq_len / layout.cp
    spread = layout.tp if layout.sequence_parallel else 1
    return 2 * tokens * shape.hidden / spread / (gpu.network_bytes * rate.links)


def step_time(shape: Shape, layout: Layout, gpu: Gpu, rate: Efficiency, *, state_bytes: int) -> StepTime:
    """Return the predicted seconds of one optimizer step, whose optimizer keeps `state_bytes` a parameter."""
    passes = [layer_seconds(shape, layout, gpu, rate, backward=backward) for backward in (False, True)]
    per_layer, exposed = (sum(values) for values in zip(*passes))
    layers = shape.num_layers / layout.pp * layout.num_micro_batches
    head = sum(head_seconds(shape, layout, gpu, rate))
    own = shape.parameters / (layout.tp * layout.pp)
    replicas = layout.dp * layout.cp
    # FP32 gradients are reduce-scattered and BF16 parameters gathered.
    data = 6 * own * (replicas - 1) / replicas / (gpu.network_bytes * rate.links)
    data *= DATA_EXPOSED if layout.overlapped else 1.0
    # Each chunk sends its activations on, and their gradients back.
    sent = 2 * send_seconds(shape, layout, gpu, rate) * EXPOSED
    last_stage = head * (layout.num_micro_batches if layout.pp == 1 else layout.num_micro_batches * 0.5)
    busy = layers * (per_layer + exposed)
    return StepTime(
        layers=layers * per_layer,
        head=last_stage,
        bubble=layout.bubble * busy,
        tensor_communication=layers * exposed,
        pipeline_communication=layout.num_micro_batches * layout.vpp * sent if layout.pp > 1 else 0.0,
        data_communication=data,
        # State and main copy (4 bytes) are read and written, the gradient (4) read, the weight written and gathered.
        optimizer=(16 + 2 * state_bytes) * own / replicas / (gpu.hbm_bytes * rate.memory),
    )

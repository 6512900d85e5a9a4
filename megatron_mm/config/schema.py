"""Every setting of a run: frozen, typed, explained under its field. What can be derived is a property."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, SerializeAsAny

from megatron_mm import optimizers
from megatron_mm.modalities import MODALITIES, EncoderSection
from megatron_mm.optimizers import OptimizerConfig
from megatron_mm.settings import NonNegativeInt, PositiveInt, Section

MAX_SECONDS = 1e9
"""What a thread can wait for."""


class ModelConfig(Section):
    """The decoder: RMSNorm, SwiGLU, RoPE, multi- or grouped-query attention, no biases, an untied head."""

    num_layers: PositiveInt
    """Transformer layers."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    ffn_hidden_size: PositiveInt
    """Width of the SwiGLU feed-forward network (each of gate and up)."""
    num_attention_heads: PositiveInt
    """Query heads."""
    num_query_groups: PositiveInt = 1
    """Key/value heads: 1 is multi-query attention, num_attention_heads is multi-head attention."""
    head_dim: PositiveInt
    """Width of one head."""
    vocab_size: PositiveInt
    """Rows of the token embedding and of the head; at least the tokenizer's ids, a multiple of tp."""
    rope_theta: PositiveFloat = 500_000.0
    """Base of the rotary position embedding."""
    norm_epsilon: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    qk_norm: bool = False
    """RMSNorm over each head of queries and keys, before the rotary embedding: keeps attention logits bounded."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of new weights; residual projections get init_std / sqrt(2 num_layers)."""


class BlendChange(Section):
    """Other weights from a step on."""

    from_step: PositiveInt
    """First optimizer step with these weights, counted from 0; batches that were left out do not move it."""
    train: dict[str, PositiveFloat]
    """Datasets and weights, as data.train; what is not named is not drawn from."""


class DataConfig(Section):
    """Where the samples come from. A batch is a pure function of (seed, step)."""

    train: tuple[str, ...] | dict[str, PositiveFloat]
    """Prefixes of the shards to train on, as tools/preprocess_data.py wrote them: a list is one dataset. Several are
    blended by weights, in tokens: {web: 0.7, "books-1,books-2": 0.3}, where a comma joins shards into one dataset."""
    changes: tuple[BlendChange, ...] = ()
    """Other weights, or other datasets, from later steps on. Each dataset goes on where it was, so a run that is
    resumed with one more change repeats no sample."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """best_fit cuts no document that fits into a sample, and no media; concatenate lays texts end to end and cuts."""
    validation: tuple[str, ...] = ()
    """Prefixes of held-out shards; empty: no validation."""
    seq_len: Annotated[int, Field(gt=0, lt=2**31)]
    """Tokens of one packed sample."""
    seed: NonNegativeInt = 1234
    """Key of the order in which samples are seen."""
    prefetch_steps: NonNegativeInt = 1
    """Steps that are read and decoded ahead in a background thread; 0 reads in the foreground."""
    stall_seconds: PositiveFloat = Field(240.0, le=MAX_SECONDS)
    """Seconds for a step after which the thread that reads ahead counts as hung and another one takes its place; after
    three of them the run ends. Keep three times this below guard.hang_seconds."""
    decoder: Literal["auto", "reference", "dali"] = "auto"
    """What decodes media: auto takes DALI where the device is a GPU, and the reference elsewhere."""

    @property
    def train_datasets(self) -> list[str]:
        """Every dataset that is trained on at some step, shards of one joined by commas."""
        first = list(self.train) if isinstance(self.train, dict) else [",".join(self.train)]
        return list(dict.fromkeys([*first, *(name for change in self.changes for name in change.train)]))

    @property
    def validation_datasets(self) -> list[str]:
        """Every prefix of held-out shards, each a dataset that a loss is reported of."""
        return list(dict.fromkeys(prefix for names in self.validation for prefix in names.split(",")))


class ParallelConfig(Section):
    """How the model is cut. Data parallelism is what remains: dp = ranks / (tp cp pp)."""

    tp: PositiveInt = 1
    """Tensor-parallel ranks; above 1 the sequence is sharded between the blocks as well (sequence parallelism)."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    vpp: PositiveInt = 1
    """Model chunks on each stage (interleaved 1F1B); 1 is plain 1F1B."""
    cp: PositiveInt = 1
    """Context-parallel ranks: each holds 1/cp of every sequence, and keys and values are all-gathered."""
    embedding_slot: bool = False
    """Count the embedding and the encoders as one layer when layers are dealt to stages."""
    loss_slot: bool = False
    """Count the head and the loss as one layer when layers are dealt to stages."""
    stage_layers: tuple[NonNegativeInt, ...] | None = None
    """Layers of each model chunk in the model's order, pp x vpp numbers (chunk c stands on stage c mod pp); null deals
    them evenly."""
    tp_comm_overlap: bool = False
    """Overlap tensor-parallel communication with the matrix products that need it, by TransformerEngine's user
    buffers."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters over data-parallel ranks while the next forward pass already runs."""

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold the model once; the others are data-parallel replicas."""
        return self.tp * self.cp * self.pp


class TrainingConfig(Section):
    """How long, how much at a time, in which precision."""

    steps: PositiveInt
    """Optimizer steps of the whole run."""
    start_from: str | None = None
    """Checkpoint whose weights a new run starts from, at step 0: of another run, or as tools/convert_checkpoint.py
    from-hf writes it; null: a decoder of random weights."""
    stop_after: PositiveInt | None = None
    """Save and end after this step, to go on later, in another layout if need be; null goes to the last step."""
    global_batch_size: PositiveInt
    """Samples of one optimizer step, over all ranks."""
    micro_batch_size: PositiveInt = 1
    """Samples of one forward and backward pass of one rank."""
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    """bf16: BF16 weights and activations, FP32 gradients, master weights and optimizer state. fp8: the same with the
    decoder layers' matrix products in FP8 by TransformerEngine; embeddings, encoders and head stay BF16."""
    fp8_recipe: Literal["current", "delayed", "blockwise"] = "current"
    """How FP8 scales are found: of each tensor as it is, of its past, or of blocks of it (128 x 128, or 1 x 128)."""
    bf16_end_layers: NonNegativeInt = 1
    """With fp8, this many of the first and of the last decoder layers stay BF16."""
    backend: Literal["auto", "local", "transformer_engine"] = "auto"
    """What decoder layers are built of: megatron-core's linear layers (local) or TransformerEngine's; auto takes the
    latter on a GPU where it is installed. A checkpoint of one is a checkpoint of the other."""
    attention: Literal["auto", "reference", "sdpa", "stacked", "varlen", "flash_attn"] = "auto"
    """Attention of the local backend: its definition or torch's scaled_dot_product_attention, document by document, our
    own for heads that share keys where it is faster (stacked: on a CPU in FP32), torch's flash kernels over all
    documents (varlen), or those of the flash-attn package; auto takes the last that can run, and the definition with
    training.kernels=reference. TransformerEngine has its own, and takes auto alone."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of the penalty log(Z)^2 of the softmax's denominator Z, which keeps logits near zero; 1e-4 is usual."""
    loss_chunk_tokens: NonNegativeInt = 0
    """Positions whose logits are held at a time, and made again in the backward pass: less memory in the last stage for
    a third more arithmetic in the head. 0 holds those of the whole micro-batch."""
    recompute: Literal["none", "selective", "mlp", "full"] = "none"
    """Activations computed again in the backward pass: none, those of the attention core (flash kernels keep none, so
    this is for sdpa), those of the feed-forward network, or whole layers."""
    seed: NonNegativeInt = 1234
    """Key of the initial weights, which do not depend on the layout."""
    check_replicas_interval: NonNegativeInt = 0
    """Steps between checks that ranks which hold the same parameters hold the same bits; 0 checks never."""
    kernels: Literal["auto", "reference", "fused", "native"] = "auto"
    """Form of our kernels (embedding, norms, rotation, SwiGLU, cross-entropy): their definitions, one operation after
    the other with torch's own gradients (reference: slow, to compare with); torch that keeps and moves less (fused); or
    CUDA (native). auto takes native where they are built and the device is a GPU, and fused elsewhere.
    TransformerEngine's layers have norms of their own, and refuse reference."""


class ScheduleConfig(Section):
    """Learning rate over steps: linear warm-up to optimizer.lr, then a decay in the chosen style."""

    style: Literal["cosine", "linear", "constant", "inverse_sqrt"] = "cosine"
    """How lr goes on after the warm-up. cosine and linear fall to optimizer.min_lr at decay_steps; constant stays;
    inverse_sqrt is lr sqrt(warmup_steps / step), never under optimizer.min_lr."""
    warmup_steps: NonNegativeInt = 10_000
    """Optimizer steps over which lr climbs from 0 to its peak."""
    decay_steps: PositiveInt | None = None
    """Optimizer step at which lr reaches its minimum; null is training.steps."""


class CheckpointConfig(Section):
    """When the run is saved; it resumes from its newest whole checkpoint, into any layout."""

    interval: NonNegativeInt = 1_000
    """Steps between checkpoints; the last step is always saved. 0 saves nothing."""
    keep: PositiveInt = 3
    """Newest checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of steps that this divides are kept for ever; 0 keeps none for ever."""
    background: bool = True
    """Write while training goes on; false waits for the disk."""
    resume: bool = True
    """Go on from the newest whole checkpoint in run_dir; false refuses a run_dir that has one."""
    memory_interval: NonNegativeInt = 0
    """Steps between copies to the memory of two nodes: newer than the newest checkpoint, they survive the loss of one
    of them, and a start in the same layout goes on from them. 0 copies nothing. Freed when the run ends."""
    memory_dir: str = "/dev/shm"
    """Where copies lie on each node, in a folder of this user alone: a file system in memory."""


class GuardConfig(Section):
    """What stops a run that has gone wrong, or takes it back to its last checkpoint."""

    max_skipped_steps: PositiveInt = 10
    """Steps in a row without a finite gradient after which the run stops."""
    spike_window: NonNegativeInt = 128
    """Steps whose losses say what is usual; nothing is a spike before half of them are done. 0 looks for none."""
    spike_deviations: PositiveFloat = 10.0
    """A loss stands out that is this many standard deviations (of the window, by its median) above the median."""
    spike_nats: NonNegativeFloat = 0.2
    """But none that is less than this above it, in nats a token, however steady the losses of the window are. After a
    planned change (data.changes, another batch size, settings changed on a resume) what is usual is learned anew."""
    spike_steps: PositiveInt = 5
    """Steps in a row that stand out after which the run goes back to its last checkpoint, or begins anew where it
    has none, without their batches."""
    max_rollbacks: NonNegativeInt = 3
    """Times that a run may go back before it stops."""
    heartbeat_seconds: PositiveFloat = Field(10.0, le=MAX_SECONDS)
    """How often each rank writes where it is to run_dir/health; at least four times in guard.hang_seconds."""
    hang_seconds: NonNegativeFloat = Field(900.0, le=MAX_SECONDS)
    """How long a rank may stand still in one phase before the run names who waits for whom, and ends. 0 waits as long
    as collectives do, and names nobody."""
    retry_minutes: NonNegativeFloat = Field(10.0, le=MAX_SECONDS / 60)
    """How long a read or write that storage refuses for now is tried again, before the rank ends for another try; less
    than guard.hang_seconds. 0 tries once."""
    slow_rank_interval: NonNegativeInt = 100
    """Steps between comparisons of how fast the ranks compute and how long they wait for data; 0 compares never."""
    slow_rank_ratio: float = Field(1.5, gt=1.0)
    """A rank is reported that takes this many times as long as the median rank."""


class EvaluationConfig(Section):
    """The loss on held-out documents, by the kind of file that they came from and by data.validation's prefixes."""

    interval: NonNegativeInt = 1_000
    """Steps between evaluations; the first and the last step are always evaluated. 0 evaluates never."""
    samples: PositiveInt = 512
    """Held-out samples of one evaluation, the same at each: all of them, or so many at even distances over all prefixes
    of data.validation, so that each is drawn from by its size."""


class LoggingConfig(Section):
    """What a run writes beside its checkpoints: metrics.jsonl always, plots and TensorBoard events as chosen."""

    tensorboard: bool = True
    """Write TensorBoard events to run_dir/tensorboard."""
    progress_bar: bool = True
    """Show a progress bar with the time that remains, where the console is a terminal."""


class Config(Section):
    """One run, complete: this is what is saved beside every checkpoint."""

    preset: str = ""
    """The preset that this configuration started from."""
    run_dir: str
    """Folder of checkpoints, metrics, plots and the resolved configuration."""
    model: ModelConfig
    # One section a modality, by its name. One whose settings all have defaults may be left out.
    __annotations__ |= {modality.name: modality.section for modality in MODALITIES}
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    training: TrainingConfig
    optimizer: SerializeAsAny[OptimizerConfig] = Field(default_factory=optimizers.find(optimizers.DEFAULT))
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def encoders(self) -> dict[str, EncoderSection]:
        """The section of each modality, by its name."""
        return {modality.name: getattr(self, modality.name) for modality in MODALITIES}

    @property
    def tokens_per_step(self) -> int:
        """Positions of one optimizer step, over all ranks."""
        return self.training.global_batch_size * self.data.seq_len

    @property
    def tokens_per_micro_batch(self) -> int:
        """Positions of one forward pass of one model replica."""
        return self.training.micro_batch_size * self.data.seq_len

    @property
    def last_step(self) -> int:
        """Optimizer step after which this launch ends."""
        return min(self.training.stop_after or self.training.steps, self.training.steps)

    @property
    def decay_steps(self) -> int:
        """Optimizer step at which the learning rate reaches its minimum."""
        return self.schedule.decay_steps or self.training.steps

    def num_micro_batches(self, dp_size: int) -> int:
        """Forward passes of one optimizer step on each of `dp_size` replicas."""
        return self.training.global_batch_size // (self.training.micro_batch_size * dp_size)

"""Every option, typed and documented. Imports no torch, so that `--cfg job` answers at once.

A name that lands in a megatron-core field is megatron-core's; else the paper's (arXiv:2401.06066); else the field's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class Attention(Enum):
    """Multi-head attention (DeepSeekMoE) or multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, 2.1)."""

    mha = "mha"
    mla = "mla"


class Routing(Enum):
    """How a token finds its experts: a learned top-k, or a fixed random table from token id to expert (Hash Layer)."""

    topk = "topk"
    hash = "hash"


class ForcedRouting(Enum):
    """Routing that ignores the affinities: the same load on all experts, or all of it on one expert-parallel rank."""

    balanced = "balanced"
    skewed = "skewed"


class Dtype(Enum):
    """Type of parameters and activations. Router logits and optimizer state are fp32 in both."""

    fp32 = "fp32"
    bf16 = "bf16"


class Fp8(Enum):
    """Number formats of matrix multiplications in 8 bits: e4m3, or hybrid, which has e5m2 for gradients."""

    e4m3 = "e4m3"
    hybrid = "hybrid"


class Fp8Recipe(Enum):
    """What shares a scale: a tensor, a block of 128, or (Blackwell) of 32 values."""

    tensorwise = "tensorwise"
    blockwise = "blockwise"
    mxfp8 = "mxfp8"


class RecomputeGranularity(Enum):
    """What is computed again: parts of a layer by name, or whole layers."""

    selective = "selective"
    full = "full"


class RecomputeModule(Enum):
    """Parts of a layer. Of the first three the output is dropped, of the others all but the input."""

    layernorm = "layernorm"
    moe_act = "moe_act"
    mla_up_proj = "mla_up_proj"
    core_attn = "core_attn"
    mlp = "mlp"
    moe = "moe"
    shared_experts = "shared_experts"


class RecomputeMethod(Enum):
    """Which layers: all, in groups of `num_layers`, or the first `num_layers` of each pipeline stage."""

    uniform = "uniform"
    block = "block"


class Dispatcher(Enum):
    """What carries tokens to their experts and back: all-to-all of NCCL or gloo, or the kernels of DeepEP."""

    alltoall = "alltoall"
    deepep = "deepep"
    hybridep = "hybridep"


class DataKind(Enum):
    """Where tokens come from."""

    python_stdlib = "python_stdlib"
    mock = "mock"
    blend = "blend"


class Verify(Enum):
    """What of a checkpoint is compared with its manifest before it is used: every byte, or sizes and small files."""

    full = "full"
    metadata = "metadata"


class OnDamage(Enum):
    """What a damaged checkpoint does to a run: end it, or make it go on from the one before."""

    stop = "stop"
    previous = "previous"


class DecayUnit(Enum):
    """What the milestones of the schedule are fractions of."""

    steps = "steps"
    tokens = "tokens"


@dataclass(kw_only=True)
class RunConfig:
    """Where a run lives. `name` has no clock in it: every rank, and every restart, must find the same folder.

    `notes`: what is tried, in words.

    `dry_run`: train and write nothing; build what each rank would hold, without its memory, and compare it with the
    plan. In one process, for as many ranks as the layout needs, `parallel.data_parallel_size` says or a launcher has
    started.
    """

    name: str = MISSING
    notes: str | None = None
    dir: str = "runs/${run.name}"
    dry_run: bool = False


@dataclass(kw_only=True)
class YarnConfig:
    """Rotary frequencies stretched for a longer context; `rotary_scaling_factor` null: plain ones.

    Source: YaRN, arXiv:2309.00071; DeepSeek-V2, arXiv:2405.04434, 3.1.4.
    """

    rotary_scaling_factor: float | None = None
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.707
    mscale_all_dim: float = 0.707


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes and routing of a DeepSeekMoE.

    `num_experts` counts routed experts only; 0, with all layers dense, is a dense model. `relative_expert_size` is the
    paper's nominal size of an expert (in a dense model of the FFN) over a standard FFN of 8 hidden_size^2 parameters;
    its FLOP counts use it. Null: of the real width.

    Device groups are contiguous groups of experts; null: the expert-parallel ranks. They are what the device-level and
    communication balance losses balance, what `device_limit` (the paper's M; null: no limit) restricts a token to, and
    what `device_capacity_factor` bounds: beyond that multiple of the mean load, a device's lowest affinities are
    dropped in training, but none of a share `undropped_fraction` of the sequences (DeepSeek-V2, arXiv:2405.04434, 2.2).
    Null: nothing is dropped. The tables of `routing=hash` follow from `hash_seed`.

    `forced_routing` is for measurements only: tokens go where it says and the model learns nothing of use. Skewed is
    the most that memory and communication may be asked for; dropping still applies.
    """

    name: str = MISSING
    num_layers: int = MISSING
    num_dense_layers: int = MISSING
    hidden_size: int = MISSING
    ffn_hidden_size: int = MISSING
    num_attention_heads: int = MISSING
    kv_channels: int = 128
    vocab_size: int = MISSING
    num_experts: int = MISSING
    num_shared_experts: int = MISSING
    expert_ffn_hidden_size: int = MISSING
    relative_expert_size: float | None = None
    routing: Routing = Routing.topk
    hash_seed: int = 1234
    forced_routing: ForcedRouting | None = None
    router_topk: int = MISSING
    routed_scaling_factor: float = 1.0
    expert_balance_factor: float = MISSING
    device_balance_factor: float = 0.0
    communication_balance_factor: float = 0.0
    num_device_groups: int | None = None
    device_limit: int | None = None
    device_capacity_factor: float | None = None
    undropped_fraction: float = 0.1
    attention: Attention = Attention.mha
    q_lora_rank: int | None = None
    kv_lora_rank: int = 512
    qk_head_dim: int = 128
    qk_pos_emb_head_dim: int = 64
    v_head_dim: int = 128
    rotary_base: int = 10000
    yarn: YarnConfig = field(default_factory=YarnConfig)
    layernorm_epsilon: float = 1e-6
    init_method_std: float = 0.006


@dataclass(kw_only=True)
class ParallelConfig:
    """How the model lies on the ranks. `data_parallel_size` null: as many replicas as the launcher's ranks allow.

    `pipeline_layout` lists the layers of each stage in pipeline order, one number per stage and virtual stage; null
    spreads them evenly, the embedding and the head each counting as one layer. `expert_tensor_parallel_size` null: 1
    with expert parallelism, else as `tensor_model_parallel_size`.

    A rank that has waited for others for `timeout_minutes` ends with an error, and so does one that for 1.1 times as
    long has begun no micro batch and no part of a save or a load, with its stack.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int = 1
    pipeline_layout: list[int] | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None
    data_parallel_size: int | None = None
    timeout_minutes: float = 10.0


@dataclass(kw_only=True)
class PrecisionConfig:
    """Number formats.

    `fp8`: of matrix multiplications in Transformer Engine's layers, by `fp8_recipe`. `grad_reduce_in_fp32`: gradients
    are summed in fp32, over micro batches and ranks, else in `dtype`.
    """

    dtype: Dtype = Dtype.fp32
    fp8: Fp8 | None = None
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise
    grad_reduce_in_fp32: bool = True


@dataclass(kw_only=True)
class RecomputeConfig:
    """Activations that are computed again in the backward pass instead of kept. `granularity` null: none are.

    `modules` are those of `selective`; `method` and `num_layers` say which layers `full` means.
    """

    granularity: RecomputeGranularity | None = None
    modules: list[RecomputeModule] = field(default_factory=list)
    method: RecomputeMethod | None = None
    num_layers: int | None = None


@dataclass(kw_only=True)
class KernelsConfig:
    """GPU kernels.

    A fusion that is null is on with Transformer Engine, where it has a kernel for it and nothing in this configuration
    excludes it, but for `apply_rope_fusion` of latent attention.
    """

    dispatcher: Dispatcher = Dispatcher.alltoall
    moe_permute_fusion: bool | None = None
    moe_router_fusion: bool | None = None
    cross_entropy_loss_fusion: bool | None = None
    apply_rope_fusion: bool | None = None
    bias_activation_fusion: bool | None = None


@dataclass(kw_only=True)
class OverlapConfig:
    """Communication while something is computed. Null: on a GPU.

    `overlap_grad_reduce`: gradients of a bucket are reduced while the backward pass computes the next ones.
    `overlap_param_gather`: updated weights are gathered when the next step's forward pass comes to them.
    `moe_shared_expert_overlap`: shared experts compute while tokens are on their way.
    `overlap_moe_expert_parallel_comm`: one micro batch's forward pass while the tokens of another's backward pass are
    on their way, and the reverse. `delay_wgrad_compute`: there, weight gradients wait for such a time.
    """

    overlap_grad_reduce: bool | None = None
    overlap_param_gather: bool | None = None
    moe_shared_expert_overlap: bool = False
    overlap_moe_expert_parallel_comm: bool = False
    delay_wgrad_compute: bool = False


@dataclass(kw_only=True)
class DataSource:
    """One indexed dataset: the path of its .bin and .idx without the ending, and its share of the samples.

    `name` is what metrics call it; null: the last part of the path.
    """

    path: str = MISSING
    weight: float = 1.0
    name: str | None = None


@dataclass(kw_only=True)
class DataConfig:
    """Training and held-out tokens.

    For `blend`: `train`, `valid` and `test`, or instead of one of the latter the share of each training source's
    documents that is dealt out to it, `valid_fraction` or `test_fraction`; and `tokenizer`, the file that made the ids,
    copied to the run (null: the one beside the first training source). For `python_stdlib`: `tokenizer_vocab_size` and
    `valid_fraction`.

    `eod_mask_loss`: no loss where the target begins another document. `reset_position_ids`: positions count from the
    beginning of a document. `reset_attention_mask`: attention stays within a document.

    `cache_dir`: of the orders of samples and of `python_stdlib`, for all nodes; `local_cache_dir`: on each node, for a
    copy of the orders (null: none). `num_workers`: processes of each rank that read ahead; 0: it reads by itself.
    `record_samples`: write each sample's number, source (its place in `train`) and digest to `samples/` in the run's
    folder.
    """

    kind: DataKind = DataKind.python_stdlib
    sequence_length: int = MISSING
    seed: int = 1234
    cache_dir: str = "data_cache"
    tokenizer_vocab_size: int = 8192
    valid_fraction: float = 0.05
    train: list[DataSource] = field(default_factory=list)
    valid: list[DataSource] = field(default_factory=list)
    test: list[DataSource] = field(default_factory=list)
    test_fraction: float = 0.0
    tokenizer: str | None = None
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    local_cache_dir: str | None = None
    num_workers: int = 0
    record_samples: bool = False


@dataclass(kw_only=True)
class OptimizerConfig:
    """AdamW (paper, 4.1.3). Weight decay acts on matrices, not on norms."""

    lr: float = MISSING
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = 1.0


@dataclass(kw_only=True)
class SchedulerConfig:
    """Linear warm-up from 0, then `lr` times `decay_factor` at each milestone; none: constant (paper, 4.1.3, 7.1)."""

    warmup_steps: int = MISSING
    milestones: list[float] = field(default_factory=list)
    decay_factor: float = 0.316
    unit: DecayUnit = DecayUnit.steps


@dataclass(kw_only=True)
class BatchRampConfig:
    """A batch that grows from `start` sequences to `global_batch_size` over the first `tokens`, `increment` at a time.

    The growth is linear in tokens. `start` null: the batch is `global_batch_size` throughout.
    """

    start: int | None = None
    increment: int | None = None
    tokens: float | None = None


@dataclass(kw_only=True)
class TrainConfig:
    """The loop. `exit_step` saves and stops there, as if preempted; the schedule still aims at `train_steps`.

    A step whose loss or gradient is not finite is skipped: nothing is updated. So is, unless `spike_sigma` is null, one
    whose loss lies more than that many standard deviations above the mean of the last `spike_window` steps. After
    `max_skipped_steps` in a row the run ends. `deterministic`: only kernels that always compute the same.
    """

    train_steps: int = MISSING
    exit_step: int | None = None
    global_batch_size: int = MISSING
    micro_batch_size: int = MISSING
    batch_ramp: BatchRampConfig = field(default_factory=BatchRampConfig)
    seed: int = 1234
    max_skipped_steps: int = 10
    spike_sigma: float | None = None
    spike_window: int = 128
    deterministic: bool = False


@dataclass(kw_only=True)
class EvaluationConfig:
    """Loss on held-out data every `interval` steps and at the end, of each source over `num_samples` (null: all)."""

    interval: int = 100
    num_samples: int | None = None


@dataclass(kw_only=True)
class CheckpointConfig:
    """Saving every `save_interval` steps and at the end; `async_save`: while the training goes on.

    The `keep_last` newest stay, and those of every `keep_every` steps. A run goes on from its latest, with another
    learning-rate schedule only if `allow_schedule_change`. A new run takes its weights from the latest checkpoint of
    the run (or imported model) `init_from`, if given.
    """

    save_interval: int = 500
    async_save: bool = False
    keep_last: int = 2
    keep_every: int | None = None
    verify: Verify = Verify.full
    on_damage: OnDamage = OnDamage.stop
    allow_schedule_change: bool = False
    init_from: str | None = None


@dataclass(kw_only=True)
class LoggerConfig:
    """Console, `metrics.jsonl` in the run folder and, if `wandb`, Weights & Biases.

    There a run is in `wandb_project` of `wandb_entity` (null: the user's own), with a group and tags to find it by, and
    a heat map of expert load every `heat_map_interval` steps.
    """

    log_interval: int = 10
    wandb: bool = False
    wandb_project: str = "megatron-moe"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_tags: list[str] = field(default_factory=list)
    heat_map_interval: int = 500


@dataclass(kw_only=True)
class ProfileConfig:
    """A trace of PyTorch's profiler of each of `steps`, on each of `ranks`, in `profile/` in the run's folder."""

    steps: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=lambda: [0])


@dataclass(kw_only=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

"""Where a run is planned to be: what tools/plan.py knows beside a run's options. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from megatron_moe.config.schema import Config, Dtype


@dataclass(kw_only=True)
class ClusterConfig:
    """GPUs, and what is between them.

    Rates are of one GPU: `peak_flops` in `dtype` and without sparsity, in FLOP/s; bandwidths in bytes/s, of links in
    one direction and of `storage_bandwidth` of a node to the file system. `num_gpus` null: as many as the layout needs.
    `device_names`: words of the names that the driver gives to such GPUs. Null rates are measured here. `shared`: the
    rates are of all that the ranks share, as CPU cores are.

    Inputs that no data sheet gives: the shares of the rates that are reached (`compute_efficiency` in all that layers
    compute, `memory_efficiency` in the optimizer, `intra_node_efficiency`, `inter_node_efficiency`); the shares of
    communication that computing hides (`all_to_all_overlap`, `data_parallel_overlap`); `expert_imbalance`, the load of
    the fullest expert-parallel rank over the mean; `usable_memory`, the share that is left by libraries and
    fragmentation; `layer_overhead_s`, seconds of a layer's forward pass whatever its tokens, of what calls its
    operations, and twice as many backward; and `gpu_mtbf_hours`, from one failure of a GPU to the next.
    `calibrated` names those that were fitted to measurements; the others are assumed.
    """

    name: str = MISSING
    device_names: list[str] = field(default_factory=list)
    num_gpus: int | None = None
    gpus_per_node: int = MISSING
    dtype: Dtype = Dtype.bf16
    shared: bool = False
    peak_flops: float | None = MISSING
    memory_bytes: float | None = MISSING
    memory_bandwidth: float | None = MISSING
    intra_node_bandwidth: float | None = MISSING
    inter_node_bandwidth: float | None = MISSING
    storage_bandwidth: float = MISSING
    compute_efficiency: float = MISSING
    memory_efficiency: float = MISSING
    intra_node_efficiency: float = MISSING
    inter_node_efficiency: float = MISSING
    all_to_all_overlap: float = 0.0
    data_parallel_overlap: float = 0.0
    expert_imbalance: float = 1.0
    usable_memory: float = 0.9
    layer_overhead_s: float = 0.0
    gpu_mtbf_hours: float = MISSING
    calibrated: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class PlanConfig(Config):
    """A run and the cluster that it is planned for."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)

"""What ranks send to each other, inside a node and between nodes. Pure; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.cluster import ClusterConfig
from megatron_moe.config.derived import data_parallel_size, expert_tensor_parallel_size
from megatron_moe.config.schema import Config, Dtype, ModelConfig
from megatron_moe.plan.attention import attention_size
from megatron_moe.plan.memory import state_bytes, tokens_of_rank
from megatron_moe.plan.params import RankParams
from megatron_moe.plan.pipeline import Layers
from megatron_moe.plan.recompute import NOTHING, Again, computed_again


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends."""

    inside: float = 0.0
    between: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.inside + other.inside, self.between + other.between)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.inside * times, self.between * times)

    @property
    def total(self) -> float:
        """All."""
        return self.inside + self.between


def seconds(cluster: ClusterConfig, traffic: Traffic) -> float:
    """What a rank needs to send: inside its node and then between nodes, at the rates that are reached."""
    return traffic.inside / (cluster.intra_node_bandwidth * cluster.intra_node_efficiency) + traffic.between / (
        cluster.inter_node_bandwidth * cluster.inter_node_efficiency
    )


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: every `stride`-th, on nodes of `gpus_per_node`."""

    size: int
    stride: int
    gpus_per_node: int

    @property
    def per_node(self) -> int:
        """Those of one node."""
        return min(self.size, max(1, self.gpus_per_node // self.stride))

    def all_to_all(self, sent: float) -> Traffic:
        """Of `sent` bytes, as many to each rank of the group, the sender too."""
        return Traffic(sent * (self.per_node - 1) / self.size, sent * (self.size - self.per_node) / self.size)

    def ring(self, whole: float) -> Traffic:
        """Of a reduction of `whole` bytes that leaves each rank its part, or of the gathering of the parts."""
        sent = whole * (self.size - 1) / self.size
        crossing = 1 / self.per_node if self.per_node < self.size else 0.0
        return Traffic(sent * (1 - crossing), sent * crossing)


@dataclass(frozen=True)
class Groups:
    """A rank's groups.

    Source of the rank order (tensor, context, data, pipeline; experts: tensor, expert, data, pipeline; fastest first):
    mcore 0.16.1, parallel_state.py, initialize_model_parallel, order "tp-cp-ep-dp-pp".
    """

    tensor: Group
    context: Group
    data: Group  # with context
    expert_tensor: Group
    expert: Group
    expert_data: Group
    pipeline: Group


def groups_of(config: Config, cluster: ClusterConfig, world_size: int) -> Groups:
    """Of a layout on a cluster."""
    parallel, on_node = config.parallel, cluster.gpus_per_node
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    expert, expert_tensor = parallel.expert_model_parallel_size, expert_tensor_parallel_size(parallel)
    stages = parallel.pipeline_model_parallel_size
    per_stage = world_size // stages
    return Groups(
        tensor=Group(tensor, 1, on_node),
        context=Group(context, tensor, on_node),
        data=Group(context * data_parallel_size(parallel, world_size), tensor, on_node),
        expert_tensor=Group(expert_tensor, 1, on_node),
        expert=Group(expert, expert_tensor, on_node),
        expert_data=Group(per_stage // (expert * expert_tensor), expert * expert_tensor, on_node),
        pipeline=Group(stages, per_stage, on_node),
    )


@dataclass(frozen=True)
class PassTraffic:
    """Of one pass of a micro batch through some layers, by what for."""

    all_to_all: Traffic
    tensor: Traffic
    context: Traffic

    def __add__(self, other: PassTraffic) -> PassTraffic:
        return PassTraffic(self.all_to_all + other.all_to_all, self.tensor + other.tensor, self.context + other.context)


@dataclass(frozen=True)
class Exchanges:
    """What a pass through some layers communicates, in elements a token.

    Attributes:
        gathered: of inputs, by tensor-parallel ranks.
        scattered: of outputs, by the same.
        keys_and_values: passed round by context-parallel ranks.
        experts: layers (no elements) whose tokens go to experts and back.
    """

    gathered: int
    scattered: int
    keys_and_values: int
    experts: int


def _of_layers(model: ModelConfig, layers: Layers) -> Exchanges:
    count, attention, hidden = layers.dense + layers.moe, attention_size(model), model.hidden_size
    dense_blocks = layers.dense + (layers.moe if model.num_shared_experts else 0) + layers.head
    return Exchanges(
        gathered=count * attention.gathered + dense_blocks * hidden,
        scattered=(count + dense_blocks + layers.embedding) * hidden,
        keys_and_values=count * attention.keys_and_values,
        experts=layers.moe,
    )


def _of_again(model: ModelConfig, again: Again) -> Exchanges:
    whole, attention = _of_layers(model, again.whole), attention_size(model)
    dense_blocks = (again.dense_ffns + again.shared_experts) * model.hidden_size
    return Exchanges(
        gathered=whole.gathered + dense_blocks + again.up_projections * attention.up_gathered,
        scattered=whole.scattered + dense_blocks,
        keys_and_values=whole.keys_and_values + again.attention_cores * attention.keys_and_values,
        experts=whole.experts + again.routed_experts,
    )


def pass_traffic(config: Config, groups: Groups, layers: Layers, *, backward: bool, imbalance: float) -> PassTraffic:
    """Of a forward or a backward pass.

    Forward, each MoE layer's all-to-all sends every token to its experts and back; backward, as much. Tensor
    parallelism, with sequence parallelism, gathers a block's input and scatters its output, and backward gathers the
    input again; routed experts do so with what the all-to-all brought. Context parallelism passes keys and values
    round, and backward these and their gradients. What is computed again in a backward pass communicates as forward.
    """
    sent = _sent(config, groups, _of_layers(config.model, layers), backward=backward, imbalance=imbalance)
    again = computed_again(config.model, config.recompute, layers) if backward else NOTHING
    if again == NOTHING:
        return sent
    return sent + _sent(config, groups, _of_again(config.model, again), backward=False, imbalance=imbalance)


def _sent(config: Config, groups: Groups, of: Exchanges, *, backward: bool, imbalance: float) -> PassTraffic:
    model = config.model
    element = 4 if config.precision.dtype is Dtype.fp32 else 2
    activation = tokens_of_rank(config) * element
    gathers, scatters = (2, 1) if backward else (1, 1)
    experts = of.experts * imbalance * model.router_topk * model.hidden_size
    return PassTraffic(
        all_to_all=groups.expert.all_to_all(activation * 2 * experts),
        tensor=groups.tensor.ring(activation * groups.tensor.size * (gathers * of.gathered + scatters * of.scattered))
        + groups.expert_tensor.ring(activation * groups.expert_tensor.size * (gathers + scatters) * experts),
        context=groups.context.ring(activation * groups.context.size * (2 if backward else 1) * of.keys_and_values),
    )


def stage_to_stage(config: Config, groups: Groups) -> Traffic:
    """Of a micro batch's activations, or their gradients, to the next stage; where some cross nodes, as those do."""
    element = 4 if config.precision.dtype is Dtype.fp32 else 2
    sent = tokens_of_rank(config) * config.model.hidden_size * element
    if groups.pipeline.size == 1:
        return Traffic()
    crosses = groups.pipeline.per_node < groups.pipeline.size
    return Traffic(0.0, sent) if crosses else Traffic(sent, 0.0)


def data_parallel(config: Config, groups: Groups, params: RankParams) -> Traffic:
    """Of a step of a rank: gradients are reduced and scattered, updated weights gathered."""
    state = state_bytes(config.precision)
    return (groups.data.ring(params.dense) + groups.expert_data.ring(params.experts)) * (state.gradient + state.weight)

"""Parameter counts in closed form. Pure; equal to the instantiated model (tests/golden, tests/distributed)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from megatron_moe.config.derived import expert_tensor_parallel_size
from megatron_moe.config.schema import ModelConfig, ParallelConfig, Routing
from megatron_moe.plan.attention import attention_size
from megatron_moe.plan.pipeline import Layers, all_layers


class Cut(Enum):
    """How the ranks of a pipeline stage share parameters."""

    replicated = "replicated"  # each rank has all
    tensor = "tensor"  # over the tensor-parallel ranks
    expert = "expert"  # over the expert-parallel ranks and those of an expert


@dataclass(frozen=True)
class Part:
    """Parameters of one kind.

    Attributes:
        name: of the part of the model, of which a part may have several entries.
        params: of all layers together.
        cut: how ranks share them.
        is_matrix: whether tokens are multiplied by them; else they are a norm or looked up.
    """

    name: str
    params: int
    cut: Cut
    is_matrix: bool = True


def parts(model: ModelConfig, layers: Layers) -> list[Part]:
    """The parameters of some layers."""
    hidden, count = model.hidden_size, layers.dense + layers.moe
    attention = attention_size(model)
    norms = count * (attention.norms + 2 * hidden) + layers.head * hidden
    found = [
        Part("embedding", layers.embedding * model.vocab_size * hidden, Cut.tensor, is_matrix=False),
        Part("attention", count * attention.cut, Cut.tensor),
        Part("attention", count * attention.replicated, Cut.replicated),
        Part("dense FFNs", layers.dense * 3 * hidden * model.ffn_hidden_size, Cut.tensor),
        *_experts(model, layers.moe),
        Part("norms", norms, Cut.replicated, is_matrix=False),
        Part("head", layers.head * model.vocab_size * hidden, Cut.tensor),
    ]
    return [part for part in found if part.params]


def _experts(model: ModelConfig, layers: int) -> Iterator[Part]:
    if not layers:
        return
    expert = layers * 3 * model.hidden_size * model.expert_ffn_hidden_size
    yield Part("routed experts", model.num_experts * expert, Cut.expert)
    yield Part("shared experts", model.num_shared_experts * expert, Cut.tensor)
    if model.routing is Routing.topk:
        yield Part("routers", layers * model.hidden_size * model.num_experts, Cut.replicated)


def _activated(model: ModelConfig, part: Part) -> int:
    return part.params * model.router_topk // model.num_experts if part.cut is Cut.expert else part.params


def total_params(model: ModelConfig) -> int:
    """All parameters, input embedding and head included."""
    return sum(part.params for part in parts(model, all_layers(model)))


def activated_params(model: ModelConfig) -> int:
    """Parameters that a token passes through, input embedding, head and router included."""
    return sum(_activated(model, part) for part in parts(model, all_layers(model)))


def multiplied_params(model: ModelConfig, layers: Layers) -> tuple[int, int]:
    """Entries of the matrices that a token is multiplied by, but for the router's: of routed experts, and others."""
    routed = sum(_activated(model, part) for part in parts(model, layers) if part.cut is Cut.expert)
    return routed, sum(
        part.params
        for part in parts(model, layers)
        if part.is_matrix and part.cut is not Cut.expert and part.name != "routers"
    )


def params_by_part(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Total and activated parameters of each part of the model."""
    total: Counter[str] = Counter()
    activated: Counter[str] = Counter()
    for part in parts(model, all_layers(model)):
        total[part.name] += part.params
        activated[part.name] += _activated(model, part)
    return {name: (total[name], activated[name]) for name in total}


@dataclass(frozen=True)
class RankParams:
    """Parameters on one rank: of routed experts, and others."""

    dense: int
    experts: int

    @property
    def total(self) -> int:
        """All."""
        return self.dense + self.experts


def rank_params(model: ModelConfig, parallel: ParallelConfig, layers: Layers) -> RankParams:
    """Parameters on each rank of a pipeline stage with these layers, exactly: all its ranks have as many."""
    share = {
        Cut.replicated: 1,
        Cut.tensor: parallel.tensor_model_parallel_size,
        Cut.expert: parallel.expert_model_parallel_size * expert_tensor_parallel_size(parallel),
    }
    on_rank = {True: 0, False: 0}
    for part in parts(model, layers):
        on_rank[part.cut is Cut.expert] += part.params // share[part.cut]
    return RankParams(dense=on_rank[False], experts=on_rank[True])

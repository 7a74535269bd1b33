"""Where a rank's optimizer state lies in the whole model's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict, ShardedTensor
from megatron.core.optimizer import DistributedOptimizer

from megatron_moe.optim.optimizer import load_state

STATES = ("param", "exp_avg", "exp_avg_sq")
Sharded = dict[int, dict[str, ShardedBase]]


def sharded_state(part: DistributedOptimizer, model_state: ShardedStateDict, *, is_loading: bool) -> Sharded:
    """Main parameters and moments of an optimizer, each under its parameter's name.

    How many optimizers and groups there are depends on the layout, so neither is named. On one data-parallel rank these
    are the tensors themselves. On several megatron-core gathers what is split among them.

    Source: megatron-core 0.16.1, distrib_optimizer.py, `sharded_param_state_fully_reshardable`.
    """
    if _is_split(part):
        return part.sharded_param_state_fully_reshardable(model_state, is_loading, metadata={})
    places = {place.data: place for place in nested_values(model_state) if isinstance(place, ShardedBase)}
    params = [param for buffer in part.buffers for param in buffer.param_index_map]
    return {i: _of_param(part, param, places[param]) for i, param in enumerate(params)}


def load_sharded_state(part: DistributedOptimizer, places: Sharded) -> None:
    """Take over what was loaded into the tensors of `sharded_state`, where these are not the optimizer's own."""
    if _is_split(part):
        load_state(part, {i: {name: place.data for name, place in of.items()} for i, of in places.items()})


def _is_split(part: DistributedOptimizer) -> bool:
    """Whether several data-parallel ranks share the state; megatron-core then gathers a copy of all of it."""
    return part.data_parallel_group.size() > 1


def _of_param(part: DistributedOptimizer, param: Any, place: ShardedBase) -> dict[str, ShardedBase]:
    tensors = part._get_main_param_and_optimizer_states(param)
    found = {}
    for state in STATES:
        values = tensors[state].detach().view(place.data.shape)
        dtype = {"dtype": values.dtype} if isinstance(place, ShardedTensor) else {}
        found[state] = replace(place, key=f"optimizer.state.{state}.{place.key}", data=values, **dtype)
    return found

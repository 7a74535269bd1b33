"""What autograd saves in a forward pass is what the plan says that layers keep."""

from __future__ import annotations

import pytest
import torch

from megatron_moe.plan.activations import activation_bytes
from megatron_moe.plan.pipeline import Layers
from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_config, tiny_run

FULL = ["recompute=full"]
SIZES = [
    "model.num_layers=2",
    "model.hidden_size=128",
    "model.ffn_hidden_size=384",
    "model.expert_ffn_hidden_size=128",
    "model.kv_channels=32",
]


def saved_bytes(commands: list[list[str]]) -> list[float]:
    """Of each command, what the forward pass of a micro batch saves besides parameters, a token."""
    return [
        _saved_bytes(["run.dir=without_checkpoints", "train.global_batch_size=2", *command]) for command in commands
    ]


def _saved_bytes(overrides: list[str]) -> float:
    from megatron_moe.train.step import train_step

    with tiny_run(overrides) as (run, batches, num_micro_batches):
        saved = Saved({p.untyped_storage().data_ptr() for chunk in run.pipeline.model for p in chunk.parameters()})
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        tokens = run.config.train.micro_batch_size * run.config.data.sequence_length
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.tensors.values()) / tokens


class Saved:
    """One tensor of each storage that is saved before the first is asked for."""

    def __init__(self, parameters: set[int]) -> None:
        self.parameters, self.tensors, self.in_forward = parameters, {}, True

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Save."""
        storage = tensor.untyped_storage().data_ptr()
        if self.in_forward and storage not in self.parameters:
            self.tensors[storage] = tensor
        return tensor

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give back."""
        self.in_forward = False
        return tensor


def planned_bytes(overrides: list[str]) -> float:
    """Of a dense and an MoE layer, a token; in fp32, twice those of bf16."""
    config, many = tiny_config(*overrides), 1e9  # micro batches, beside which what one computes again is nothing
    return 2 * activation_bytes(config.model, config.recompute, [Layers(1, 1)], many) / many


def test_what_is_computed_again_is_not_saved() -> None:
    """Without fused kernels, layers keep half as much again as the plan says, but in the same proportions.

    Our experts keep less: they take again what the first matrix is given, and compute again what the second is.
    """
    choices = [[*SIZES, *options] for options in ([], ["recompute=selective", "recompute.modules=[moe]"], FULL)]
    ((all_saved, without_moe, inputs, inputs_of_3),) = run_ranks(
        saved_bytes, 1, [*choices, [*SIZES, *FULL, "model.num_layers=3"]]
    )
    planned, planned_without_moe, planned_inputs = map(planned_bytes, choices)
    assert planned_inputs == pytest.approx(2 * (inputs_of_3 - inputs))
    assert 1 < (all_saved - inputs) / (planned - planned_inputs) < 1.6
    model = tiny_config(*SIZES).model
    not_kept = 4 * model.router_topk * (model.hidden_size + model.expert_ffn_hidden_size)
    planned_share = (planned - planned_without_moe - not_kept) / (planned - planned_inputs)
    assert (all_saved - without_moe) / (all_saved - inputs) == pytest.approx(planned_share, rel=0.2)

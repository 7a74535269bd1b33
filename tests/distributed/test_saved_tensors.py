"""What autograd saves in a forward pass is what the plan says that layers keep."""

from __future__ import annotations

import torch

from megatron_moe.plan.activations import layer_activation_bytes
from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_config, tiny_run

# Without the paper's losses, whose intermediates would stand out beside so few experts.
SIZES = [
    "model.hidden_size=128",
    "model.ffn_hidden_size=384",
    "model.expert_ffn_hidden_size=64",
    "model.kv_channels=32",
]


def saved_bytes(commands: list[list[str]]) -> list[float]:
    """Of each command, what the forward pass of a micro batch saves besides parameters, a token."""
    from megatron_moe.train.step import train_step

    found = []
    for overrides in commands:
        with tiny_run(["run.dir=without_checkpoints", "train.global_batch_size=2", *overrides]) as (
            run,
            batches,
            count,
        ):
            saved = Saved({p.untyped_storage().data_ptr() for c in run.pipeline.model for p in c.parameters()})
            with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
                train_step(run.pipeline, run.optimizer, batches, count)
            tokens = run.config.train.micro_batch_size * run.config.data.sequence_length
            found.append(sum(tensor.untyped_storage().nbytes() for tensor in saved.tensors.values()) / tokens)
    return found


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


def test_layers_that_are_computed_again_keep_their_input() -> None:
    """An MoE layer's share: the difference of a layer. In fp32, twice the bytes of the plan."""
    choices = [[], ["recompute=full"], ["recompute=selective", "recompute.modules=[moe]"]]
    commands = [[*SIZES, f"model.num_layers={layers}", *options] for options in choices for layers in (3, 2)]
    (saved,) = run_ranks(saved_bytes, 1, commands)
    plain, full, moe = (more - less for more, less in zip(saved[::2], saved[1::2], strict=True))
    print(plain, full, moe, 2 * layer_activation_bytes(tiny_config(*SIZES).model, moe=True))
    assert full == 4 * 128

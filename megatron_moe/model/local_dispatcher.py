"""Tokens that find all experts on their own rank."""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from megatron_moe.model.experts import GroupedExperts


def dispatch_locally(model: torch.nn.Module) -> None:
    """Leave tokens where they are in layers whose experts are all here, and are ours."""
    for layer in model.modules():
        if isinstance(layer, MoELayer) and isinstance(layer.experts, GroupedExperts):
            experts = layer.experts
            if experts.ep_group.size() == experts.tp_group.size() == 1 and not layer.shared_expert_overlap:
                layer.token_dispatcher = LocalDispatcher()


class LocalDispatcher:
    """The interface of megatron-core's dispatchers, without a permutation.

    The experts take a few experts' tokens at a time from where they are and add what comes of them there, so that no
    copy of a token for each expert that it selected is made and kept. megatron-core's makes three (0.16.1,
    moe/token_dispatcher.py:732).
    """

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Of [s, b, h] tokens, [s * b, h], and their probs [s * b, experts]."""
        self.shape, self.routing_map = hidden_states.shape, routing_map
        return hidden_states.flatten(0, 1), probs

    def token_dispatch(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing is sent."""
        return tokens, probs

    def dispatch_postprocess(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `GroupedExperts` takes."""
        return tokens, self.routing_map, probs

    def combine_preprocess(self, output: Tensor) -> Tensor:
        """As it is."""
        return output

    def token_combine(self, output: Tensor) -> Tensor:
        """As it is."""
        return output

    def combine_postprocess(self, output: Tensor) -> Tensor:
        """[s, b, h]."""
        return output.view(self.shape)

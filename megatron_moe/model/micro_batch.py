"""What modules know of the micro batch they work on besides their input."""

from __future__ import annotations

from collections import deque

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor


class OfMicroBatch:
    """A tensor of a micro batch, also while a layer computes it again in its backward pass.

    By then a pipeline has been through later micro batches. Backward passes come in the order of the forward passes.
    """

    def __init__(self) -> None:
        self._newest: Tensor | None = None
        self._computed_again: deque[Tensor] = deque()

    def begin(self, tensor: Tensor) -> None:
        """Take the tensor of the next forward pass."""
        self._newest = tensor

    def get(self, *, training: bool) -> Tensor:
        """The tensor of the micro batch that is computed."""
        if not (training and is_checkpointing()):
            return self._newest
        if torch.is_grad_enabled():
            return self._computed_again.popleft()
        self._computed_again.append(self._newest)
        return self._newest

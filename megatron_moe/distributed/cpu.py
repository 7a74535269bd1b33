"""megatron-core 0.16.1 on a CPU.

megatron-core assumes CUDA. Each entry of `WORKAROUNDS` meets one assumption; tests/distributed/test_workarounds.py
leaves each out in turn and goes red when megatron-core no longer needs it. Applied once per process, before the model
is built, and only where there is no GPU. Nothing here runs per operation: constants are replaced inside the functions
that hold them, and the rest are attributes.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import optimizer as mcore_optimizer
from megatron.core import utils
from megatron.core.models.common.embeddings import rotary_pos_embedding, yarn_rotary_pos_embedding
from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import mappings, random
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

CPU = torch.device("cpu")


# Functions with `device="cuda"`, and those that compare `param.type()` with a name.
DEVICE_LITERALS: tuple[Callable[..., Any], ...] = (
    schedules.forward_backward_no_pipelining,
    schedules.forward_backward_pipelining_with_interleaving,
    schedules.forward_backward_pipelining_without_interleaving,
    clip_grads.get_grad_norm_fp32,
    clip_grads.clip_grad_by_total_norm_fp32,
    utils.local_multi_tensor_l2_norm,
    optimizer.MixedPrecisionOptimizer.__init__,
)
TYPE_NAMES: tuple[Callable[..., Any], ...] = (
    clip_grads.clip_grad_by_total_norm_fp32,
    distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups,
    distrib_optimizer.DistributedOptimizer.__init__,
)


def install() -> None:
    """Apply every work-around. Idempotent."""
    for apply in WORKAROUNDS.values():
        apply()


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Make tensors on the meta device, and let megatron-core's optimizer take them for a CPU's.

    It is PyTorch's, also where Transformer Engine or Apex have one, which would begin to use a GPU.
    """
    is_pytorch = mcore_optimizer.USING_PYTORCH_OPTIMIZER
    names = {f"torch.{kind}Tensor": f"torch.meta.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")}
    mcore_optimizer.USING_PYTORCH_OPTIMIZER = True
    _rename_types(names)
    try:
        with torch.device("meta"):
            yield
    finally:
        _rename_types({meta: name for name, meta in names.items()})
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = is_pytorch


def _current_device() -> None:
    torch.cuda.current_device = torch.get_default_device  # the CPU, or "meta" where a model is only counted


def _device_literals() -> None:
    for function in DEVICE_LITERALS:
        _replace_constants(function, {"cuda": "cpu"})


def _type_names() -> None:
    _rename_types({f"torch.cuda.{kind}Tensor": f"torch.{kind}Tensor" for kind in ("Float", "Half", "BFloat16")})


def _rename_types(names: dict[str, str]) -> None:
    for function in TYPE_NAMES:
        _replace_constants(function, names)


def _synchronize() -> None:
    torch.cuda.synchronize = lambda device=None: None


class _NullStream:
    """A CUDA stream, and the events on it: nothing runs elsewhere that could be waited for."""

    def wait_stream(self, stream: _NullStream) -> None:
        """Return at once."""

    def record_event(self) -> _NullStream:
        """An event that has already happened."""
        return self

    def synchronize(self) -> None:
        """Return at once."""


def _streams() -> None:
    stream = _NullStream()
    torch.cuda.Stream = lambda *args, **kwargs: stream
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _pinned_positions() -> None:
    def slice_for_rank(pos_emb: Tensor, seq_dim: int, cp_group: dist.ProcessGroup) -> Tensor:
        rank, size = cp_group.rank(), cp_group.size()
        chunks = pos_emb.chunk(2 * size, dim=seq_dim)
        return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]), dim=seq_dim)

    for module in (rotary_pos_embedding, yarn_rotary_pos_embedding):
        module.get_pos_emb_on_this_cp_rank = slice_for_rank


def _split_sizes() -> None:
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


def _generator_state() -> None:
    random._get_cuda_rng_state = lambda *args, **kwargs: None  # nothing draws from it: there is no dropout
    random._set_cuda_rng_state = lambda *args, **kwargs: None


GATHER = mappings._gather_along_first_dim
REDUCE_SCATTER = mappings._reduce_scatter_along_first_dim


def _uneven_parts() -> None:
    def gather(
        input_: Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, buffer: bool = False
    ) -> Tensor:
        if sizes is None:
            return GATHER(input_, group, None, buffer)
        longest = max(sizes)
        parts = GATHER(_pad_rows(input_, longest), group).split(longest)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def scatter(
        input_: Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, buffer: bool = False
    ) -> Tensor:
        if sizes is None:
            return REDUCE_SCATTER(input_, group, None, buffer)
        padded = torch.cat([_pad_rows(part, max(sizes)) for part in input_.split(sizes)])
        return REDUCE_SCATTER(padded, group)[: sizes[group.rank()]]

    mappings._gather_along_first_dim = gather
    mappings._reduce_scatter_along_first_dim = scatter


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(rows - x.shape[0], *x.shape[1:])))


def _replace_constants(function: Callable[..., Any], replacements: dict[str, str]) -> None:
    function = getattr(function, "__func__", function)  # of a class method
    function.__code__ = _with_constants(function.__code__, replacements)


def _with_constants(value: Any, replacements: dict[str, str]) -> Any:
    if isinstance(value, str):
        return replacements.get(value, value)
    if isinstance(value, tuple):
        return tuple(_with_constants(item, replacements) for item in value)
    if isinstance(value, types.CodeType):
        return value.replace(co_consts=_with_constants(value.co_consts, replacements))
    return value


WORKAROUNDS: dict[str, Callable[[], None]] = {
    "current_device": _current_device,
    "device_literals": _device_literals,
    "type_names": _type_names,
    "synchronize": _synchronize,
    "streams": _streams,
    "pinned_positions": _pinned_positions,
    "split_sizes": _split_sizes,
    "generator_state": _generator_state,
    "uneven_parts": _uneven_parts,
}

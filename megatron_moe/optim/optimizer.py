"""AdamW in megatron-core's distributed optimizer."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    DistributedOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_moe.config.schema import Config, Dtype


def build_optimizer(
    config: Config, model: list[DistributedDataParallel], pg_collection: ProcessGroupCollection
) -> ChainedOptimizer:
    """AdamW with weight decay on matrices only, its state sharded over the data-parallel ranks.

    Without Transformer Engine and Apex megatron-core takes `torch.optim.AdamW` with its slow default loop; the fused
    kernel, which computes the same, is switched on.
    """
    options = config.optimizer
    bf16 = config.precision.dtype is Dtype.bf16
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=0.0,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=model[0].ddp_config.overlap_param_gather,
    )
    optimizer = get_megatron_optimizer(
        optimizer_config,
        model,
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
        pg_collection=pg_collection,
    )
    for part in optimizer.chained_optimizers:
        _prepare(part)
    return optimizer


def _prepare(part: DistributedOptimizer) -> None:
    """Set each group's weight decay, switch on the fused kernel, and allocate the state, so that it can be loaded."""
    for group in part.optimizer.param_groups:
        group["weight_decay"] = (
            part.config.weight_decay * group["wd_mult"]
        )  # left to mcore's own scheduler, unused here
        if isinstance(part.optimizer, torch.optim.AdamW):
            group["fused"] = True
    part.init_state_fn(part.optimizer, part.config)
    set_num_updates(part, 0)


def set_num_updates(part: DistributedOptimizer, num_updates: int) -> None:
    """Set the number of updates done, which AdamW's bias correction depends on; skipped steps are none.

    Torch keeps it with each parameter, the fused optimizers of Apex and Transformer Engine with each group.
    """
    for group in part.optimizer.param_groups:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for param in group["params"]:
                part.optimizer.state[param]["step"] = torch.tensor(float(num_updates), device=param.device)
        else:
            group["step"] = num_updates


def prepare_gradients(optimizer: ChainedOptimizer) -> tuple[float, bool]:
    """First half of `ChainedOptimizer.step` (megatron-core 0.16.1): hand the gradients to the optimizer.

    Returns:
        Norm over all parameters on all ranks, and whether every gradient on this rank is finite.
    """
    optimizer.prepare_grads()
    norm = optimizer.get_grad_norm()
    return norm, math.isfinite(norm) and math.isfinite(_norm_of_the_rest(optimizer))


def _norm_of_the_rest(optimizer: ChainedOptimizer) -> float:
    """Of this rank's gradients that the norm leaves out: of parameters that tensor-parallel rank 0 has too."""
    rest = []
    for part in optimizer.chained_optimizers:
        in_norm = part.get_main_grads_for_grad_norm()
        counted = {id(gradient) for gradient in in_norm}
        gradients = [param.grad for param in part.get_parameters() if param.grad is not None]
        rest += [gradient for gradient in gradients if id(gradient) not in counted]
    return torch.nn.utils.get_total_norm(rest).item() if rest else 0.0


def clip_and_update(optimizer: ChainedOptimizer, grad_norm: float) -> None:
    """Second half of `ChainedOptimizer.step` (megatron-core 0.16.1): clip the prepared gradients and update."""
    for part in optimizer.chained_optimizers:
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
    optimizer.step_with_ready_grads()


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Set the learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = lr

"""Documents that share a sequence: kept apart, they give what each gives alone, and what Hugging Face gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import hugging_face
from tests.helpers.hugging_face import V1, V2_LITE, V2_YARN
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, tiny_config, tiny_run

LENGTHS = [[9, 1, 15, 8], [33], [1, 20, 12]]  # of documents, in sequences of 32 with the token after them
YARN = [*MLA, "model.yarn.rotary_scaling_factor=8", "model.yarn.original_max_position_embeddings=8"]
MODELS = {"mha": [], "mla": MLA, "yarn": YARN}
ATTENTION, POSITIONS = "data.reset_attention_mask=true", "data.reset_position_ids=true"


def tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (len(LENGTHS), 32), generator=torch.Generator().manual_seed(1))


def batch_of(ids: torch.Tensor, options: Any) -> dict[str, torch.Tensor]:
    """As the sampler makes it."""
    from megatron_moe.data.sampler import by_document

    found = by_document([np.array(row) for row in LENGTHS], options)
    plain = {"position_ids": torch.arange(32).expand(len(ids), 32), "sample_ids": torch.arange(len(ids))}
    return {"tokens": ids, **plain, **found}


@torch.no_grad()
def forward(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    for module in model.modules():
        if hasattr(module, "begin_micro_batch"):
            module.begin_micro_batch(batch)
    return model(batch["tokens"], batch["position_ids"], batch.get("attention_mask"))


def packed_and_alone(overrides: list[str]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """On a rank: logits of the packed sequences by options, and of each document by itself in their place."""
    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_model

    ids, packed = tokens(256), {}
    config = tiny_config(*overrides)
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        for name, options in (("attention", [ATTENTION]), ("both", [ATTENTION, POSITIONS]), ("positions", [POSITIONS])):
            config = tiny_config(*overrides, *options)
            (chunk,) = build_model(config, context.pg_collection, context.device)
            packed[name] = forward(chunk.module.eval(), batch_of(ids, config.data))
        (chunk,) = build_model(tiny_config(*overrides), context.pg_collection, context.device)
        model = chunk.module.eval()
        alone = torch.stack(
            [
                torch.cat(
                    [
                        model(piece[None], torch.arange(len(piece))[None], None)[0]
                        for piece in row.split([*lengths[:-1], lengths[-1] - 1])
                    ]
                )
                for row, lengths in zip(ids, LENGTHS, strict=True)
            ]
        ).detach()
        return packed, alone


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_give_what_each_gives_alone(name: str) -> None:
    ((packed, alone),) = run_ranks(packed_and_alone, 1, MODELS[name])
    for options in ("attention", "both"):
        torch.testing.assert_close(packed[options], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed["positions"][:, :1], alone[:, :1])
    assert (packed["positions"] - alone).abs().max() > 1e-2


def our_logits(imported: Path) -> dict[str, torch.Tensor]:
    """On a rank: logits of an imported model by options."""
    from megatron_moe.checkpoint.checkpointer import load_weights
    from megatron_moe.checkpoint.run_folder import find_checkpoint
    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_model
    from megatron_moe.train.restore import read_config

    config = read_config(imported)
    config.data.sequence_length = 32
    config.data.reset_position_ids = True
    found = {}
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        for name in ("positions", "both"):
            config.data.reset_attention_mask = name == "both"
            (chunk,) = build_model(config, context.pg_collection, context.device)
            load_weights([chunk], find_checkpoint(imported), config.model)
            found[name] = forward(chunk.module.eval(), batch_of(tokens(V1["vocab_size"]), config.data))
    return found


def expected_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids and an additive mask, written down token by token."""
    position_ids = torch.tensor([[i for n in row for i in range(n)][:32] for row in LENGTHS])
    mask = torch.full((len(LENGTHS), 1, 32, 32), torch.finfo(torch.float32).min)
    for b, row in enumerate(LENGTHS):
        begins = np.cumsum([0, *row[:-1]])
        for begin, n in zip(begins, row, strict=True):
            for i in range(begin, min(begin + n, 32)):
                mask[b, 0, i, begin : i + 1] = 0
    return position_ids, mask


@pytest.mark.parametrize("fields", [V1, V2_LITE, V2_YARN], ids=["v1", "v2_lite", "yarn"])
def test_logits_are_those_of_hugging_face_with_the_same_positions_and_mask(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    from megatron_moe.hugging_face.importer import import_model

    theirs = hugging_face.make(fields, tmp_path / "hf", 1)
    import_model(tmp_path / "hf", tmp_path / "imported")
    (ours,) = run_ranks(our_logits, 1, tmp_path / "imported")
    position_ids, mask = expected_batch()
    ids = tokens(V1["vocab_size"])
    with torch.no_grad():
        for name, options in (("positions", {}), ("both", {"attention_mask": mask})):
            hidden = theirs.model(ids, position_ids=position_ids, **options).last_hidden_state
            torch.testing.assert_close(ours[name], theirs.lm_head(hidden), atol=1e-4, rtol=0)
    plain = hugging_face.logits(theirs, ids)
    assert min((logits - plain).abs().max() for logits in ours.values()) > 1e-2
    assert (ours["positions"] - ours["both"]).abs().max() > 1e-2


def masked_loss(overrides: list[str]) -> None:
    """On a rank: two micro batches through the pipeline, and the same in plain torch."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.utils import get_model_config

    with tiny_run(["run.dir=without_checkpoints", *overrides]) as (run, _, _):
        (chunk,) = run.pipeline.model
        ids = tokens(256)
        both = batch_of(ids, run.config.data) | {"labels": ids.roll(-1, dims=1)}
        assert 0 < both["loss_mask"].mean() < 1
        first = {name: tensor[:1] for name, tensor in both.items()}  # more documents in one than in the other
        second = {name: tensor[1:2] for name, tensor in both.items()}

        chunk.train()
        chunk.zero_grad_buffer()
        get_model_config(chunk).finalize_model_grads_func = finalize_model_grads
        loss = run.pipeline.run([iter([first, second])], 2, forward_only=False)
        parameters = dict(chunk.module.named_parameters())
        gradients = {name: parameter.main_grad.clone() for name, parameter in parameters.items()}

        plain = torch.zeros(())
        for batch in (first, second):
            logits = chunk.module(batch["tokens"], batch["position_ids"], None)
            losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            plain = plain + (losses * batch["loss_mask"].flatten()).sum()
        expected = torch.autograd.grad(plain / (2 * 32), list(parameters.values()))
        torch.testing.assert_close(loss[0], plain.detach(), rtol=1e-5, atol=0)
        assert loss[1] == first["loss_mask"].sum() + second["loss_mask"].sum()
        for (name, gradient), other in zip(gradients.items(), expected, strict=True):
            assert (gradient - other).norm() <= 1e-5 * other.norm(), name


def test_the_masked_loss_and_its_gradient_are_a_sum_over_all_places() -> None:
    dense = ["num_experts", "num_shared_experts", "router_topk", "expert_balance_factor", "device_balance_factor"]
    options = [*(f"model.{name}=0" for name in dense), "model.num_dense_layers=4", "data.eod_mask_loss=true"]
    run_ranks(masked_loss, 1, options)

"""Converted models against Hugging Face's own code, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_moe.hugging_face.exporter import export_run
from megatron_moe.hugging_face.importer import import_model
from tests.helpers import hugging_face
from tests.helpers.hugging_face import V1, V1_DENSE, V2, V2_LITE, V2_YARN
from tests.helpers.ranks import run_ranks

SEEDS = (1, 2)
LENGTHS = (1, 7, 128)


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, V1["vocab_size"], (2, length), generator=torch.Generator().manual_seed(length))


def our_logits(folder: Path) -> dict[str, list[torch.Tensor]]:
    """On a rank: logits of each imported model, and of random weights, which are left as a run."""
    import os

    from megatron.core import dist_checkpointing

    from megatron_moe.checkpoint.checkpointer import load_weights
    from megatron_moe.checkpoint.manifest import write_manifest
    from megatron_moe.checkpoint.run_folder import find_checkpoint, plain
    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_model
    from megatron_moe.train.restore import read_config

    config = read_config(folder / f"imported{SEEDS[0]}")
    found = {}
    with distributed(config.parallel, init_method=os.environ["MEGATRON_MOE_INIT_METHOD"]) as context:
        for seed in SEEDS:
            config.train.seed = seed
            (chunk,) = build_model(config, context.pg_collection, context.device)
            model = hugging_face.with_uneven_norms(chunk.module).eval()
            found[f"run{seed}"] = forward(model)
            checkpoint = folder / f"run{seed}" / "checkpoints" / "step_00000001"
            checkpoint.mkdir(parents=True)
            dist_checkpointing.save({"model": model.sharded_state_dict()}, str(checkpoint))
            (checkpoint / "state.json").write_text(json.dumps({"config": plain(config)}))
            write_manifest(checkpoint)
            load_weights([model], find_checkpoint(folder / f"imported{seed}"), config.model)
            found[f"imported{seed}"] = forward(model)
    return found


@torch.no_grad()
def forward(model: Any) -> list[torch.Tensor]:
    """Logits of each length, [batch, sequence, vocabulary]."""
    return [model(tokens(n), torch.arange(n)[None].expand(2, n), None) for n in LENGTHS]


@pytest.mark.parametrize("fields", [V1, V1_DENSE, V2_LITE, V2, V2_YARN], ids=["v1", "dense", "v2_lite", "v2", "yarn"])
def test_logits_are_those_of_hugging_face(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = {}
    for seed in SEEDS:
        theirs[f"imported{seed}"] = hugging_face.make(fields, tmp_path / f"hf{seed}", seed)
        import_model(tmp_path / f"hf{seed}", tmp_path / f"imported{seed}")
    (ours,) = run_ranks(our_logits, 1, tmp_path)
    for seed in SEEDS:
        export_run(tmp_path / f"run{seed}", tmp_path / f"exported{seed}")
        theirs[f"run{seed}"] = hugging_face.load(tmp_path / f"exported{seed}")
    for name, model in theirs.items():
        for length, got in zip(LENGTHS, ours[name], strict=True):
            expected = hugging_face.logits(model, tokens(length))
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

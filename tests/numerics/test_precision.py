"""bf16: close to fp32, with router, optimizer state and gradient sums in fp32."""

import numpy as np
import pytest
import torch

from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run, train_tiny


@pytest.mark.parametrize("layout", ["single", "pp2_ep2"])
def test_losses_stay_near_fp32(layout: str) -> None:
    (reference,) = run_ranks(train_tiny, 1, [])
    ranks = run_ranks(train_tiny, 4 if layout == "pp2_ep2" else 1, ["precision=bf16", f"parallel={layout}"])
    ours, theirs = ([m["train/lm_loss"] for m in r["metrics"]] for r in (ranks[0], reference))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)  # bf16 keeps 8 bits: 4e-3 a value, averaged over tokens


def dtypes() -> dict[str, torch.dtype]:
    with tiny_run(["precision=bf16"]) as (run, _, _):
        model = run.pipeline.model[0]
        router = model.module.module.decoder.layers[1].mlp.router
        state = next(iter(run.optimizer.chained_optimizers[0].optimizer.state.values()))
        logits = router.gating(torch.randn(2, 2, run.config.model.hidden_size, dtype=torch.bfloat16))
        return {
            "parameters": next(model.parameters()).dtype,
            "gradient sums": next(model.parameters()).main_grad.dtype,
            "moments": state["exp_avg"].dtype,
            "router logits": logits.dtype,
            "load": router.counters.tokens_per_expert.dtype,
        }


def test_what_stays_fp32() -> None:
    (found,) = run_ranks(dtypes, 1)
    assert found.pop("parameters") is torch.bfloat16
    assert set(found.values()) == {torch.float32}

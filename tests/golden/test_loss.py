"""Twenty stored losses: a change that should not alter the computation leaves them equal."""

import numpy as np

from tests.helpers.ranks import run_ranks
from tests.helpers.training import train_tiny

# lm_loss of the tiny model on one rank, fp32, torch 2.13.0 on a CPU. Sums in another order differ by 1e-7.
LOSSES = [5.6424646, 5.5767817, 5.634675, 5.617445, 5.6281805, 5.6556969, 5.6424036, 5.626483, 5.6327634, 5.6100278]
LOSSES += [5.6047363, 5.6301765, 5.5727797, 5.608017, 5.6071219, 5.6108341, 5.6517653, 5.5715928, 5.5947046, 5.6416883]


def test_losses_are_the_stored_ones() -> None:
    (result,) = run_ranks(train_tiny, 1, [])
    np.testing.assert_allclose([m["train/lm_loss"] for m in result["metrics"]], LOSSES, rtol=1e-5)

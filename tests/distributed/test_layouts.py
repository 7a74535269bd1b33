"""The same model, data and steps give the same losses, balance losses and gradients in every layout."""

from pathlib import Path

import numpy as np
import pytest

from megatron_moe.data.indexed import IndexedWriter
from tests.helpers.ranks import run_ranks
from tests.helpers.training import MLA, assemble, tiny_run, train_tiny

MICRO_4 = ["train.micro_batch_size=4"]
VPP = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
# name: overrides, ranks
LAYOUTS = {
    "micro batch 1": (["train.micro_batch_size=1"], 1),
    "micro batch 4": (["train.micro_batch_size=4"], 1),
    "dp2": (["parallel=dp2"], 2),
    "ep2": (["parallel=ep2"], 2),
    "ep4": (["parallel=ep4"], 4),
    "pp2": (["parallel=pp2"], 2),
    "pp4, first stage without experts": (["parallel=pp4"], 4),
    "pp2 uneven": (["parallel=pp2", "parallel.pipeline_layout=[3,1]"], 2),
    "pp2 x vpp2": (VPP, 2),
    "pp2 x ep2, first stage without experts": (["parallel=pp2_ep2", "parallel.pipeline_layout=[1,3]"], 4),
    "pp2 x ep2": (["parallel=pp2_ep2"], 4),
    "tp2": (["parallel=tp2"], 2),
    "tp2 x ep2": (["parallel=tp2_ep2"], 2),
    "tp2 x dp2": (["parallel=tp2", "parallel.data_parallel_size=2"], 4),
    "tp2 x ep2 x expert tp2": (["parallel=tp2_ep2", "parallel.expert_tensor_parallel_size=2"], 4),
    "cp2": (["parallel=cp2"], 2),
    "tp2 x cp2": (["parallel=tp2", "parallel.context_parallel_size=2"], 4),
}
LOSSES = (
    "train/lm_loss",
    "train/expert_balance_loss",
    "train/device_balance_loss",
    "train/communication_balance_loss",
    "moe/dropped_fraction",
)
DEEPSEEK_V2_ROUTING = [
    "model.num_device_groups=4",
    "model.device_limit=2",
    "model.router_topk=3",
    "model.routed_scaling_factor=16",
    "model.device_balance_factor=0.05",
    "model.communication_balance_factor=0.02",
    "model.device_capacity_factor=1.0",
    "model.undropped_fraction=0.3",
]
HASH = ["model.routing=hash", "model.router_topk=1", "model.expert_balance_factor=0", "model.device_balance_factor=0"]
DENSE = [f"model.{name}=0" for name in ("num_experts", "num_shared_experts", "router_topk", "expert_balance_factor")]
DENSE += ["model.num_dense_layers=4", "model.device_balance_factor=0"]


@pytest.fixture(scope="module")
def single() -> dict:
    return run_ranks(train_tiny, 1, ["parallel=single"])[0]


def compare(ranks: list[dict], reference: dict) -> None:
    # fp32 sums in another order differ by 1e-7, and training amplifies that: a token near a tie takes another expert
    for name in reference["metrics"][0].keys() & LOSSES:
        ours = [m[name] for m in ranks[0]["metrics"]]
        theirs = [m[name] for m in reference["metrics"]]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6, err_msg=f"{name} of the first step")
    np.testing.assert_allclose(ranks[0]["valid"], reference["valid"], rtol=1e-5)
    first, expected_first = ranks[0]["metrics"][0], reference["metrics"][0]
    np.testing.assert_allclose(first["train/grad_norm"], expected_first["train/grad_norm"], rtol=1e-5)
    gradients = assemble([rank["gradients"] for rank in ranks])
    expected = assemble([reference["gradients"]])
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        difference = np.linalg.norm(gradient - expected[name]) / np.linalg.norm(expected[name])
        assert difference < 1e-5, f"gradient of {name}: {difference:.1e}"


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_rank(name: str, single: dict) -> None:
    overrides, world_size = LAYOUTS[name]
    compare(run_ranks(train_tiny, world_size, overrides), single)


def test_reference_moves(single: dict) -> None:
    """A comparison of runs that stand still would prove nothing."""
    untrained = run_ranks(train_tiny, 1, [], 0)[0]["valid"]
    assert abs(single["valid"] - untrained) > 0.01
    assert min(m["train/device_balance_loss"] for m in single["metrics"]) > 0


YARN = ["model.yarn.rotary_scaling_factor=4", "model.yarn.original_max_position_embeddings=16"]


@pytest.mark.parametrize(
    ("layout", "positions"), [("tp2_ep2", []), ("pp2_ep2", []), ("cp2", YARN)], ids=["tp2_ep2", "pp2_ep2", "cp2_yarn"]
)
def test_latent_attention(layout: str, positions: list[str]) -> None:
    world_size = 4 if "pp2" in layout else 2
    reference = run_ranks(train_tiny, 1, [*MLA, *positions])[0]
    compare(run_ranks(train_tiny, world_size, [*MLA, *positions, f"parallel={layout}"]), reference)


# What is dispatched together shares a budget: two expert-parallel ranks' micro batches of 2, as one rank's of 4.
@pytest.mark.parametrize(
    ("layout", "world_size", "micro_batch_size"),
    [("ep2", 2, 2), ("pp2", 2, 4), ("tp2", 2, 4), ("tp2_ep2", 2, 4), ("pp2_ep2", 4, 2)],
)
def test_deepseek_v2_routing(layout: str, world_size: int, micro_batch_size: int, single_v2: dict) -> None:
    options = [f"parallel={layout}", f"train.micro_batch_size={micro_batch_size}"]
    compare(run_ranks(train_tiny, world_size, [*DEEPSEEK_V2_ROUTING, *options]), single_v2)


@pytest.fixture(scope="module")
def single_v2() -> dict:
    result = run_ranks(train_tiny, 1, [*DEEPSEEK_V2_ROUTING, "train.micro_batch_size=4"])[0]
    assert all(0 < m["moe/dropped_fraction"] < 0.7 for m in result["metrics"])
    return result


@pytest.mark.parametrize(("options", "layouts"), [(HASH, "pp2 tp2 ep2"), (DENSE, "pp2 tp2")], ids=["hash", "dense"])
def test_other_models(options: list[str], layouts: str) -> None:
    single = run_ranks(train_tiny, 1, options)[0]
    for layout in layouts.split():
        compare(run_ranks(train_tiny, 2, [*options, f"parallel={layout}"]), single)


DOCUMENTS = ["data.eod_mask_loss=true", "data.reset_position_ids=true", "data.reset_attention_mask=true"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a blend with several documents to a sequence, kept apart."""
    folder = tmp_path_factory.mktemp("packed")
    random = np.random.default_rng(1)
    for name in ("a", "b"):
        lengths = random.integers(1, 25, 120)
        writer = IndexedWriter(folder / name, np.uint16)
        writer.append(random.integers(0, 256, lengths.sum()), lengths)
        writer.finish()
    return ["data=blend", "data.sequence_length=32", *train_and_valid(folder), *DOCUMENTS]


def train_and_valid(folder: Path) -> list[str]:
    train = f"data.train=[{{path: {folder}/a, weight: 2}}, {{path: {folder}/b}}]"
    return [train, f"data.valid=[{{path: {folder}/b}}]", f"data.cache_dir={folder}/cache"]


@pytest.mark.parametrize(("attention", "layouts"), [([], "tp2 cp2 pp2 ep2"), (MLA, "tp2 cp2")], ids=["mha", "mla"])
def test_documents_apart(attention: list[str], layouts: str, packed: list[str]) -> None:
    options = [*packed, *attention]
    single, together = (run_ranks(train_tiny, 1, o, 4)[0] for o in (options, options[: -len(DOCUMENTS)]))
    losses, other = ([m["train/lm_loss"] for m in run["metrics"]] for run in (single, together))
    assert min(abs(a - b) for a, b in zip(losses, other, strict=True)) > 1e-4
    for layout in layouts.split():
        compare(run_ranks(train_tiny, 2, [*options, f"parallel={layout}"], 4), single)


def loss_of_first(overrides: list[str], num_samples: int) -> float:
    """On each rank: the held-out loss of an untrained model."""
    from megatron_moe.train.evaluate import held_out_loss

    with tiny_run(["run.dir=without_checkpoints", *overrides]) as (run, _, _):
        data = run.datasets.valid[0].sequences
        return held_out_loss(run.pipeline, data, num_samples, run.config.data, run.context.device)


@pytest.mark.parametrize("kind", ["mock", "documents apart"])
def test_samples_that_fill_up_micro_batches_do_not_count(kind: str, packed: list[str]) -> None:
    options = packed if kind == "documents apart" else []
    expected = run_ranks(loss_of_first, 1, [*options, "train.micro_batch_size=1"], 5)[0]
    assert abs(run_ranks(loss_of_first, 1, [*options, "train.micro_batch_size=1"], 6)[0] - expected) > 1e-4
    layouts = [(["train.micro_batch_size=2"], 1), (["parallel=dp2"], 2), (["parallel=dp2", *MICRO_4], 2), (VPP, 2)]
    for layout, world_size in layouts:
        losses = run_ranks(loss_of_first, world_size, [*options, *layout], 5)
        np.testing.assert_allclose(losses, expected, rtol=1e-6, err_msg=str(layout))

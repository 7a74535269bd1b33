"""Placement of layers and experts: pure arithmetic."""

import pytest

from megatron_moe.config.derived import batch_size, num_micro_batches, required_world_size, samples_before
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.schema import ParallelConfig
from megatron_moe.plan.flops import model_flops_per_token
from megatron_moe.plan.hardware import peak_flops
from megatron_moe.plan.memory import static_bytes
from megatron_moe.plan.params import parts, total_params
from megatron_moe.plan.pipeline import all_layers, even_layout, layers_by_stage, layers_of_stage, mcore_layout
from megatron_moe.plan.placement import placements


@pytest.mark.parametrize(
    ("num_layers", "chunks", "expected"),
    [
        (62, 4, [15, 16, 16, 15]),  # 145B: embedding and head are a layer's work each
        (62, 8, [7, 8, 8, 8, 8, 8, 8, 7]),
        (4, 1, [4]),
        (4, 2, [2, 2]),
        (4, 4, [1, 1, 1, 1]),
        (9, 2, [5, 4]),
        (27, 4, [6, 8, 7, 6]),
    ],
)
def test_even_layout(num_layers: int, chunks: int, expected: list[int]) -> None:
    layout = even_layout(num_layers, chunks)
    assert layout == expected
    work = [layers + (chunk == 0) + (chunk == chunks - 1) for chunk, layers in enumerate(layout)]
    assert max(work) - min(work) <= 1 or min(layout) == 1


def test_interleaved_stages_take_chunks_in_turn() -> None:
    config = compose_config(["parallel=pp2_vpp2"])
    assert layers_of_stage(config.model, config.parallel, 0) == [[0], [2]]
    assert layers_of_stage(config.model, config.parallel, 1) == [[1], [3]]


def test_mcore_layout_holds_embedding_layers_and_loss_once() -> None:
    config = compose_config(["model=deepseekmoe_145b", "parallel=pp4"])
    flat = [kind for chunk in mcore_layout(config.model, config.parallel) for kind in chunk]
    assert flat == ["embedding", *["decoder"] * 62, "loss"]


@pytest.mark.parametrize(
    ("choice", "ranks"),
    [("single", 1), ("dp2", 2), ("ep2", 2), ("pp4", 4), ("pp2_ep2", 4), ("tp2_ep2", 2), ("pp4_ep4", 16), ("cp2", 2)],
)
def test_required_world_size(choice: str, ranks: int) -> None:
    assert required_world_size(compose_config([f"parallel={choice}"]).parallel) == ranks


def test_expert_ranks_that_no_multiple_of_the_stage_fits_round_up() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=3)
    assert required_world_size(parallel) == 6


def test_num_micro_batches() -> None:
    config = compose_config(["train.global_batch_size=32", "train.micro_batch_size=4"])
    assert num_micro_batches(config, world_size=2, consumed_samples=0) == 4


def test_every_layer_and_expert_lies_somewhere_once() -> None:
    config = compose_config(["parallel=pp4_ep4"])
    places = placements(config.model, config.parallel, 16)
    assert sorted(rank for place in places for rank in place.ranks) == list(range(16))
    layers = [layer for place in places[::4] for chunk in place.layers for layer in chunk]
    assert layers == list(range(config.model.num_layers))
    for stage in range(1, 4):
        experts = [e for place in places if place.stage == stage for e in place.experts]
        assert experts == list(range(64))
    assert places[0].experts is None  # the first stage is the dense layer alone


RAMP = ["train.batch_ramp.start=2", "train.batch_ramp.increment=2", "train.batch_ramp.tokens=10000"]


def test_batch_ramp_is_linear_in_tokens() -> None:
    """From 2 to 8 in 3 increments over 10,000 tokens of 128 a sequence: one increment every 26.04 sequences."""
    config = compose_config(RAMP)
    sizes = [batch_size(config, samples) for samples in range(100)]
    assert sizes == [2] * 27 + [4] * 26 + [6] * 26 + [8] * 21
    assert batch_size(compose_config([]), 0) == 8


@pytest.mark.parametrize("options", [[], RAMP, [*RAMP, "train.batch_ramp.start=8"], ["experiment=deepseek_v2"]])
def test_samples_before_adds_up_the_steps(options: list[str]) -> None:
    config, samples = compose_config(options), 0
    for step in range(3000):
        if step % 7 == 0:
            assert samples_before(config, step) == samples
        samples += batch_size(config, samples)


@pytest.mark.parametrize("name", [path.stem for path in sorted((CONF_DIR / "experiment").glob("*.yaml"))])
def test_stages_hold_the_whole_model(name: str) -> None:
    config = compose_config([f"experiment={name}"])
    on_stages = [parts(config.model, layers) for layers in layers_by_stage(config.model, config.parallel)]
    assert len(on_stages) == config.parallel.pipeline_model_parallel_size
    assert sum(part.params for stage in on_stages for part in stage) == total_params(config.model)


def test_static_memory_is_18_bytes_a_parameter_on_one_gpu() -> None:
    config = compose_config(["precision=bf16"])
    assert static_bytes(config, 1, all_layers(config.model)) == tuple(
        times * total_params(config.model) for times in (2, 4, 12)
    )
    in_fp32 = static_bytes(compose_config([]), 1, all_layers(config.model))
    assert sum(in_fp32) == 16 * total_params(config.model)  # the optimizer updates the weights themselves


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H800", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_peak_of_a_device_is_known_by_its_name(device: str, teraflops: float | None) -> None:
    assert peak_flops(device) == (teraflops and teraflops * 1e12)


def test_model_flops_of_the_16b() -> None:
    """By hand: 6 x 2,615,279,616 entries of matrices, and 6 x 28 layers x 2048 of the attention for each token."""
    matrices = 28 * (4 * 2048**2) + 3 * 2048 * 10944 + 27 * (8 * 3 * 2048 * 1408) + 102_400 * 2048
    assert matrices == 2_615_279_616
    assert model_flops_per_token(compose_config(["model=deepseekmoe_16b"]).model, 4096) == (
        6 * matrices + 6 * 28 * 2048 * 4096
    )

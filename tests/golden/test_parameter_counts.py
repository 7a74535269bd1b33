"""Parameter counts and FLOPs: papers' and released models' figures, closed form, and the instantiated model."""

import pytest
import torch

from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.schema import ModelConfig
from megatron_moe.plan.flops import paper_flops_per_token
from megatron_moe.plan.params import activated_params, total_params
from tests.helpers.ranks import run_ranks

MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
# total, activated: sums over the tensors of the released checkpoints
RELEASED = {
    "deepseekmoe_16b": (16_375_728_128, 2_828_650_496),
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208),
    "deepseek_v2": (235_741_434_880, 21_375_800_320),
}
# As printed, in billions, None where nothing is: total, activated, of the experts total, of the experts activated.
# arXiv:2401.06066: tables 1 and 2, 8 and 9 (2B), 5.1.2 and 6.2 (16B), table 6 (145B, 142B, GShard 137B).
PRINTED = {
    "deepseekmoe_2b": ("2.0", "0.3", "1.89", "0.24"),
    "dense_2b": ("0.2", "0.2", None, None),
    "dense_2b_x4": (None, None, "0.47", "0.47"),
    "dense_2b_x16": (None, None, "1.89", "1.89"),
    "hash_2b": ("2.0", "0.2", None, None),
    "switch_2b": ("2.0", "0.2", None, None),
    "gshard_2b": ("2.0", "0.3", None, None),
    "gshard_2b_x1_2": (None, None, "2.3", "0.28"),
    "gshard_2b_x1_5": (None, None, "2.83", "0.35"),
    "deepseekmoe_16b": ("16.4", "2.8", None, None),
    "deepseekmoe_145b": ("144.6", "22.2", None, None),
    "gshard_137b": ("136.5", None, None, None),  # activated: 21.6 printed, 21.7 of these widths
}
# TFLOPs per sequence as printed, and the sequence length: tables 1 and 2 (2K), 3 and 6 (4K).
TERAFLOPS = {
    "dense_2b": ("2.9", 2048),
    "hash_2b": ("2.9", 2048),
    "switch_2b": ("2.9", 2048),
    "gshard_2b": ("4.3", 2048),
    "deepseekmoe_2b": ("4.3", 2048),
    "gshard_2b_x1_5": ("5.8", 2048),
    "dense_2b_x16": ("24.6", 2048),
    "deepseekmoe_16b": ("74.4", 4096),
    "deepseekmoe_145b": ("585.6", 4096),
    "deepseekmoe_142b_half": ("374.6", 4096),
    "gshard_137b": ("572.7", 4096),
}


def model_of(name: str) -> ModelConfig:
    return compose_config([f"model={name}"]).model


def billions(count: float, printed: str) -> str:
    """With as many digits as printed."""
    return f"{count / 1e9:.{len(printed.split('.')[1])}f}"


def count_on_meta(names: list[str]) -> dict[str, tuple[int, int]]:
    """Parameters of each whole model, and without the routed experts that a token does not take."""
    from megatron_moe.distributed.context import distributed
    from megatron_moe.model.build import build_chunks
    from megatron_moe.model.transformer_config import transformer_config

    counts = {}
    with distributed(compose_config([]).parallel) as context:
        for name in names:
            config = compose_config([f"model={name}"])
            mcore_config = transformer_config(config)
            (model,) = build_chunks(config, mcore_config, context.pg_collection, torch.device("meta"))
            sizes = {n: p.numel() for n, p in model.named_parameters() if p.is_meta}
            experts = sum(size for n, size in sizes.items() if ".experts." in n and "shared" not in n)
            total, unused = sum(sizes.values()), config.model.num_experts - config.model.router_topk
            counts[name] = total, total - experts // max(1, config.model.num_experts) * unused
    return counts


@pytest.mark.parametrize("name", RELEASED)
def test_released_checkpoints(name: str) -> None:
    model = model_of(name)
    assert (total_params(model), activated_params(model)) == RELEASED[name]


def test_instantiated_models() -> None:
    """Every model of conf/model."""
    (counts,) = run_ranks(count_on_meta, 1, MODELS)
    expected = {name: (total_params(model_of(name)), activated_params(model_of(name))) for name in MODELS}
    assert counts == expected


@pytest.mark.parametrize("name", PRINTED)
def test_printed_counts(name: str) -> None:
    model = model_of(name)
    if model.num_experts:
        width, total, activated = (
            model.expert_ffn_hidden_size,
            model.num_experts + model.num_shared_experts,
            model.router_topk + model.num_shared_experts,
        )
    else:
        width, total, activated = model.ffn_hidden_size, 1, 1
    expert = 3 * model.hidden_size * width * model.num_layers
    counts = (total_params(model), activated_params(model), expert * total, expert * activated)
    for count, printed in zip(counts, PRINTED[name], strict=True):
        assert printed is None or billions(count, printed) == printed


def test_printed_counts_that_leave_something_out() -> None:
    half = compose_config(["model=deepseekmoe_142b_half", "model.vocab_size=100015"]).model
    assert billions(total_params(half), "142.3") == "142.3"  # of the tokenizer's own entries, without padding
    assert billions(activated_params(half), "13.6") == "13.6"  # table 6 prints 12.2, its own TFLOPs give this
    # arXiv:2405.04434, appendix B, and 3.1.2: without the input embedding, 2.4B also without routers
    lite, v2 = model_of("deepseek_v2_lite"), model_of("deepseek_v2")
    routers = 26 * lite.hidden_size * lite.num_experts
    assert billions(activated_params(lite) - lite.vocab_size * lite.hidden_size - routers, "2.4") == "2.4"
    assert round((activated_params(v2) - v2.vocab_size * v2.hidden_size) / 1e9) == 21


@pytest.mark.parametrize("name", TERAFLOPS)
def test_printed_flops(name: str) -> None:
    printed, length = TERAFLOPS[name]
    assert f"{paper_flops_per_token(model_of(name), length) * length / 1e12:.1f}" == printed


def test_ablations_keep_the_parameters() -> None:
    """arXiv:2401.06066, 4.4: as many parameters and FLOPs as GShard; 4.5: half of the activated experts."""
    reference = model_of("gshard_2b")
    for name in ("1s_1of15", "1s_3of31", "2s_6of62", "4s_4of60"):
        model = model_of(f"deepseekmoe_2b_{name}")
        assert total_params(model) == pytest.approx(total_params(reference), rel=5e-4)
        assert paper_flops_per_token(model, 2048) == pytest.approx(paper_flops_per_token(reference, 2048), rel=1e-3)
    half, whole = model_of("deepseekmoe_2b_1s_3of63"), model_of("deepseekmoe_2b")
    assert (half.router_topk + 1) * 2 == whole.router_topk + 1


def test_nano_models_activate_the_same() -> None:
    whole = activated_params(model_of("deepseekmoe_nano"))
    for name in ("dense", "hash", "switch", "gshard"):
        assert activated_params(model_of(f"{name}_nano")) == pytest.approx(whole, rel=0.01)


def test_nano_is_large_enough_to_be_a_model() -> None:
    model = compose_config([]).model
    assert total_params(model) >= 10_000_000
    assert model.num_experts % 4 == 0

"""A checkpoint of another run, of another version or of other tensors is refused, and what differs is listed."""

from pathlib import Path

import pytest

from tests.distributed.test_checkpoint import save
from tests.helpers.checkpoints import edit_state
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import train_and_digest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_ranks(save, 1, "single", str(tmp_path))
    return tmp_path


def refusal(run: Path, *overrides: str) -> str:
    with pytest.raises(AssertionError) as error:
        run_ranks(train_and_digest, 1, [f"run.dir={run}", *overrides])
    assert "ConfigError" in str(error.value)
    return str(error.value)


def test_every_option_of_another_architecture_is_listed(run: Path) -> None:
    options = {"num_layers": 3, "hidden_size": 32, "num_experts": 4, "attention": "mla"}
    said = refusal(run, *(f"model.{name}={value}" for name, value in options.items()))
    for name, value in options.items():
        assert f"model.{name}={value}: {run} was trained with" in said


def test_every_unknown_option_of_a_saved_configuration_is_listed(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000003"
    edit_state(checkpoint, config={"model": {"num_expert_groups": 3}, "train": {"sharpness": 0.5}})
    said = refusal(run)
    for option in ("model.num_expert_groups=3", "train.sharpness=0.5"):
        assert f"{checkpoint}/state.json: {option}: there is no such option" in said


def test_tensors_of_another_shape_are_refused_even_where_the_configuration_agrees(run: Path) -> None:
    edit_state(run / "checkpoints" / "step_00000003", config={"model": {"expert_ffn_hidden_size": 16}})
    with pytest.raises(AssertionError, match=r"experts\.linear_fc[12]\.weight"):
        run_ranks(train_and_digest, 1, [f"run.dir={run}", "model.expert_ffn_hidden_size=16"])

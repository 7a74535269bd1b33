"""A run's folder, read back."""

from pathlib import Path

import pytest
import yaml

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.schema import KernelsConfig, OverlapConfig, RecomputeConfig
from megatron_moe.data.tokenizer import train_tokenizer
from megatron_moe.train.restore import RestoredRun, read_config, restored
from tests.helpers.training import tiny_config


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"run: [", "config.yaml: no YAML"),
        (b"\xff", "config.yaml: no YAML"),
        (b"", "config.yaml: holds no options"),
        (b"model: {num_layer: 3}", "num_layer"),
        (None, "No such file or directory; is .* the folder of a run"),
    ],
)
def test_damaged_configurations_are_named(content: bytes | None, expected: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=expected):
        read_config(tmp_path)


def test_what_was_for_training_only_is_left_out(tmp_path: Path) -> None:
    options = ["recompute=full", "kernels.dispatcher=deepep", "precision=fp8"]
    trained = tiny_config("train.deterministic=true", "parallel=ep2", "run.name=a", *options, world_size=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(trained)))
    config = read_config(tmp_path)
    assert not config.train.deterministic
    assert config.parallel.expert_model_parallel_size == 1
    assert (config.recompute, config.kernels, config.overlap) == (RecomputeConfig(), KernelsConfig(), OverlapConfig())
    assert config.precision.fp8 is None


def test_a_run_of_forced_routing_is_not_looked_at(tmp_path: Path) -> None:
    measured = tiny_config("model.forced_routing=balanced", "run.name=a")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(plain(measured)))
    with pytest.raises(ConfigError, match=r"model\.forced_routing=balanced was for measurements only"):
        restored(tmp_path).__enter__()


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    train_tokenizer(["a text of many words " * 9], 300).save(str(tmp_path / "tokenizer.json"))
    config = tiny_config("data=mock", "model.vocab_size=256")
    with pytest.raises(ConfigError, match=r"entries, the model model\.vocab_size=256"):
        RestoredRun(config, tmp_path, tmp_path, None, None).tokenizer()

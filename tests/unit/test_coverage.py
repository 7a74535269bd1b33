"""What an index lacks of a model is named by layer and expert."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from megatron_moe.checkpoint.coverage import OPTIMIZER, Layout, layouts_of, problems_of_chunks, problems_of_coverage
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import CONF_DIR, compose_config
from megatron_moe.config.schema import ModelConfig
from megatron_moe.model.names import other_name, our_tensors
from tests.helpers.training import MLA, tiny_config

MODELS = sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml"))
EXPERTS = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"


def saved(model: ModelConfig, prefixes: tuple[str, ...] = ("", *OPTIMIZER)) -> dict[str, Layout]:
    """Every tensor of a model, each matrix of a stack a chunk."""
    layouts = {}
    for name, tensor in our_tensors(model).items():
        whole = tuple((0, size) for size in tensor.shape)
        rows = [whole] if tensor.stack is None else [((i, i + 1), *whole[1:]) for i in range(tensor.stack)]
        layouts |= {prefix + name: Layout(tensor.shape, tuple(rows)) for prefix in prefixes}
    return layouts


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model(name: str) -> None:
    model = compose_config([f"model={name}"]).model
    weights = saved(model, ("",))
    assert problems_of_coverage(weights, model, with_optimizer=False) == []
    assert len(problems_of_coverage(weights, model)) == 3 * len(weights)
    assert problems_of_coverage(saved(model), model) == []


@pytest.mark.parametrize("options", [[], MLA])
def test_norms_may_have_the_names_of_transformer_engine(options: list[str]) -> None:
    model = tiny_config(*options).model
    layouts = saved(model)
    renamed = {other_name(name) or name: layout for name, layout in layouts.items()}
    assert renamed.keys() != layouts.keys()
    assert problems_of_coverage(renamed, model) == []
    assert problems_of_coverage(renamed | layouts, model) == []


@pytest.mark.parametrize("prefix", ["", *OPTIMIZER])
def test_lost_experts(prefix: str) -> None:
    model = tiny_config().model
    layouts, key = saved(model), prefix + EXPERTS
    kept = [chunk for chunk in layouts[key].chunks if chunk[0][0] not in (3, 4, 7)]
    layouts[key] = replace(layouts[key], chunks=tuple(kept))
    assert problems_of_coverage(layouts, model) == [
        f"{key}: layer 2, experts 3 to 4: 8,192 of 32,768 values were not saved",
        f"{key}: layer 2, expert 7: 4,096 of 32,768 values were not saved",
    ]
    del layouts[key]
    assert problems_of_coverage(layouts, model) == [f"{key}: layer 2, experts 0 to 7: was not saved"]


def test_lost_layers_of_a_dense_model() -> None:
    model = compose_config(["model=dense_nano"]).model
    layouts, key = saved(model), "decoder.layers.mlp.linear_fc2.weight"
    layouts[key] = replace(layouts[key], chunks=layouts[key].chunks[:-1])
    (problem,) = problems_of_coverage(layouts, model)
    assert problem.startswith(f"{key}: layer {model.num_layers - 1}: ")


def test_other_shapes_and_chunks() -> None:
    model = tiny_config().model
    layouts = saved(model)
    layouts |= {
        "output_layer.weight": Layout((255, 64), (((0, 255), (0, 64)),)),
        "decoder.final_layernorm.weight": Layout((64,), (((0, 64),), ((32, 64),))),
        "embedding.word_embeddings.weight": Layout((256, 64), (((0, 256), (0, 65)),)),
        "rng": Layout((2, 8), (((0, 1), (0, 8)),)),
    }
    assert problems_of_coverage(layouts, model) == [
        "output_layer.weight: shape (255, 64), the model's is (256, 64)",
        "embedding.word_embeddings.weight: chunk [0:256, 0:65] is not within its shape (256, 64)",
        "decoder.final_layernorm.weight: 32 of 64 values were saved more than once",
        "rng: 8 of 16 values were not saved",
    ]


@settings(max_examples=200)
@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=3), data=st.data())
def test_counts_are_those_of_a_count_by_value(shape: list[int], data: st.DataObject) -> None:
    spans = [list(itertools.combinations(range(size + 1), 2)) for size in shape]
    boxes = data.draw(st.lists(st.tuples(*map(st.sampled_from, spans)), max_size=5))
    times = np.zeros(shape, dtype=int)
    for box in boxes:
        times[tuple(slice(*span) for span in box)] += 1
    found = {"were not saved": 0, "were saved more than once": 0}
    for problem in problems_of_chunks({"x": Layout(tuple(shape), tuple(boxes))}):
        count, what = problem.removeprefix("x: ").split(f" of {math.prod(shape)} values ")
        found[what] += int(count)
    assert found == {"were not saved": (times == 0).sum(), "were saved more than once": (times > 1).sum()}


def test_a_malformed_index() -> None:
    with pytest.raises(ConfigError, match="the index is malformed"):
        layouts_of(Metadata(state_dict_metadata=3))

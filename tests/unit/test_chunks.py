"""Parts of flattened tensors as boxes."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.checkpoint.chunks import boxes


@st.composite
def ranges(draw: st.DrawFn) -> tuple[tuple[int, ...], int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    start = draw(st.integers(0, math.prod(shape) - 1))
    return shape, start, draw(st.integers(start + 1, math.prod(shape)))


@given(ranges())
def test_boxes_are_the_range_in_order(drawn: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = drawn
    values = np.arange(math.prod(shape)).reshape(shape)
    parts = list(boxes(shape, start, stop))
    found = [values[tuple(slice(o, o + n) for o, n in zip(*box, strict=True))].reshape(-1) for box in parts]
    np.testing.assert_array_equal(np.concatenate(found), np.arange(start, stop))
    assert len(parts) <= 2 * len(shape) - 1


def test_whole_rows_are_one_box() -> None:
    assert list(boxes((4, 3), 0, 12)) == [((0, 0), (4, 3))]
    assert list(boxes((4, 3), 1, 11)) == [((0, 1), (1, 2)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]

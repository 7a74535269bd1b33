"""The order of passes in the plan is what megatron-core's schedules do."""

import pytest

from megatron_moe.plan.schedule import Kind, Pass, one_forward_one_backward
from tests.helpers.ranks import run_ranks
from tests.helpers.training import tiny_run

Recorded = list[tuple[str, int, int]]  # kind, chunk, micro batch


def recorded(overrides: list[str]) -> tuple[int, Recorded]:
    """On each rank: its pipeline stage, and the passes of one step in time."""
    from megatron.core.pipeline_parallel import schedules

    from megatron_moe.train.step import train_step

    forward_step, backward_step = schedules.forward_step, schedules.backward_step
    passes: Recorded = []
    outputs: dict[int, tuple[object, int, int]] = {}  # by identity, which holds as long as the tensor does

    with tiny_run(overrides) as (run, batches, num_micro_batches):
        chunks = {id(chunk): number for number, chunk in enumerate(run.pipeline.model)}
        seen = dict.fromkeys(chunks.values(), 0)

        def forward(step_func, iterator, model, *args, **options):
            output = forward_step(step_func, iterator, model, *args, **options)
            chunk = chunks[id(model)]
            tensor = output[0][0] if isinstance(output[0], list) else output[0]
            outputs[id(tensor)] = (tensor, chunk, seen[chunk])
            passes.append(("forward", chunk, seen[chunk]))
            seen[chunk] += 1
            return output

        def backward(inputs, output, *args, **options):
            tensor = output[0] if isinstance(output, list) else output
            passes.append(("backward", *outputs.pop(id(tensor))[1:]))
            return backward_step(inputs, output, *args, **options)

        schedules.forward_step, schedules.backward_step = forward, backward
        try:
            train_step(run.pipeline, run.optimizer, batches, num_micro_batches)
        finally:
            schedules.forward_step, schedules.backward_step = forward_step, backward_step
        return run.context.pg_collection.pp.rank(), passes


@pytest.mark.parametrize(
    ("layout", "ranks", "stages", "virtual"), [("pp4", 4, 4, 1), ("pp2_vpp2", 2, 2, 2), ("pp2_ep2", 4, 2, 1)]
)
def test_order_is_that_of_megatron_core(layout: str, ranks: int, stages: int, virtual: int) -> None:
    sizes = ["train.global_batch_size=16", "train.micro_batch_size=1"]
    replicas = ranks // stages
    expected = one_forward_one_backward(stages, virtual, 16 // replicas)
    for stage, passes in run_ranks(recorded, ranks, [f"parallel={layout}", *sizes]):
        assert [Pass(Kind(kind), chunk, number) for kind, chunk, number in passes] == expected[stage]

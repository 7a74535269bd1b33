"""The training run, top to bottom in the order it happens."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.optimizer import ChainedOptimizer

from megatron_moe.checkpoint.checkpointer import Checkpointer
from megatron_moe.checkpoint.state import TrainState
from megatron_moe.config.derived import batch_size, last_step, num_micro_batches
from megatron_moe.config.errors import Preempted, TrainingError
from megatron_moe.config.schema import Config
from megatron_moe.data.dataset import unigram_entropy
from megatron_moe.data.sampler import micro_batches
from megatron_moe.data.sources import Datasets, HeldOut, build_datasets
from megatron_moe.distributed import signals
from megatron_moe.distributed.context import DistributedContext, from_main
from megatron_moe.metrics.logger import FORCED_ROUTING, MetricLogger, Metrics, evaluation_line, progress_line
from megatron_moe.metrics.throughput import Throughput
from megatron_moe.model.build import build_model
from megatron_moe.optim.optimizer import build_optimizer, set_learning_rate
from megatron_moe.optim.scheduler import learning_rate
from megatron_moe.train.agreement import Agreement, check_same_dtype
from megatron_moe.train.evaluate import held_out_loss
from megatron_moe.train.guard import Guard
from megatron_moe.train.recording import Recorder
from megatron_moe.train.saving import Saving
from megatron_moe.train.speed_metrics import speed_metrics
from megatron_moe.train.start import print_start, write_run_files
from megatron_moe.train.step import Batches, Pipeline, StepResult, train_step
from megatron_moe.train.step_metrics import step_metrics


@dataclass(frozen=True)
class Run:
    """Everything the loop works with."""

    config: Config
    context: DistributedContext
    datasets: Datasets
    pipeline: Pipeline
    optimizer: ChainedOptimizer
    checkpointer: Checkpointer
    state: TrainState
    notes: list[str]
    guard: Guard
    saving: Saving
    recorder: Recorder

    @property
    def last_step(self) -> int:
        """The step after which this process stops."""
        return last_step(self.config)

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps, and at the end, happens after this step."""
        return self.state.step % interval == 0 or self.state.step == self.last_step


def train(config: Config, context: DistributedContext, overrides: list[str]) -> None:
    """Train to `train.train_steps`, or to `train.exit_step`, from the latest checkpoint if there is one.

    Args:
        config: validated for the ranks of `context`.
        context: this rank.
        overrides: of the command line, for the record.

    Raises:
        ConfigError: the data or the checkpoint do not fit the configuration, or ranks compute in different types.
    """
    check_same_dtype(config.precision.dtype)
    run = set_up(config, context)
    print_start(config, context, run.pipeline.model, run.datasets)
    from_main(lambda: write_run_files(config, overrides, context.world_size, run.datasets.tokenizer))
    for note in run.notes:
        run.context.say(note)
    if config.checkpoint.init_from is not None and run.state.step == 0:
        run.context.say(f"weights from {config.checkpoint.init_from}")
    run.context.say(f"{config.run.dir}: from step {run.state.step:,} to {run.last_step:,}")

    with _logger(run) as logger:
        batches = next_batches(run)
        throughput = Throughput()
        evaluation: Metrics = {}
        while run.state.step < run.last_step:
            lr = learning_rate(config, run.state.step)
            result = _step(run, batches, lr)
            samples = batch_size(config, run.state.consumed_samples)
            run.state.advance(samples)
            throughput.count(samples * config.data.sequence_length)
            if result.skipped is not None:
                run.context.say(
                    f"step {run.state.step} | skipped: {result.skipped} ({run.state.skipped_in_a_row} in a row)"
                )
            if logger is not None:
                logger.count_step(run.state.step, result.agreement.loss, result.skipped)

            metrics: Metrics = {}
            evaluates = run.is_due(config.evaluation.interval)
            if evaluates or run.is_due(config.logger.log_interval):
                metrics |= _measure(run, result, lr, samples, throughput)
                run.context.say(progress_line(run.state.step, config.train.train_steps, metrics))
            with throughput.paused():
                if evaluates:
                    evaluation = _evaluate(run)
                    metrics |= evaluation
            if logger is not None and metrics:
                logger.log(run.state.step, metrics)  # before a save: from there on nothing is computed again
            with throughput.paused():
                _save(run, result.agreement)

    _summarize(run, evaluation)


def set_up(config: Config, context: DistributedContext) -> Run:
    """Build data, model and optimizer, and go to where the latest checkpoint left off."""
    torch.manual_seed(config.train.seed + context.rank)  # nothing draws from it but what users add
    datasets = build_datasets(config)
    model = build_model(config, context.pg_collection, context.device)
    optimizer = build_optimizer(config, model, context.pg_collection)
    checkpointer = Checkpointer(config, model, optimizer, datasets.fingerprints)
    state, notes = checkpointer.load_latest()
    pipeline = Pipeline(model, context.pg_collection, config.data.sequence_length, config.train.micro_batch_size)
    return Run(
        config=config,
        context=context,
        datasets=datasets,
        pipeline=pipeline,
        optimizer=optimizer,
        checkpointer=checkpointer,
        state=state,
        notes=notes,
        guard=Guard(config.train, state),
        saving=Saving(checkpointer, in_background=config.checkpoint.async_save, say=context.say, saved_step=state.step),
        recorder=Recorder(config, context, pipeline, optimizer, range(state.step + 1, last_step(config) + 1)),
    )


def _logger(run: Run) -> contextlib.AbstractContextManager[MetricLogger | None]:
    if run.context.is_main:
        return MetricLogger(run.config, first_step=run.state.step)
    return contextlib.nullcontext()


def next_batches(run: Run) -> list[Batches]:
    """The micro batches from here on: one iterator over the same ones for each model chunk."""
    chunks = [
        micro_batches(
            run.datasets.train,
            first_sample=run.state.consumed_samples,
            micro_batch_size=run.config.train.micro_batch_size,
            options=run.config.data,
            pg_collection=run.context.pg_collection,
            device=run.context.device,
            record=_record(run) if chunk == 0 else None,
        )
        for chunk in range(len(run.pipeline.model))
    ]
    return [run.pipeline.timers.waiting_for(batches, "data_wait") for batches in chunks]


def _record(run: Run) -> Path | None:
    """Where this rank writes its samples, if asked for: one rank of those that read the same ones."""
    groups = run.context.pg_collection
    if not run.config.data.record_samples or any(group.rank() for group in (groups.tp, groups.cp, groups.pp)):
        return None
    path = Path(run.config.run.dir) / "samples" / f"rank_{run.context.rank:05}.jsonl"
    path.parent.mkdir(exist_ok=True)
    return path


def _step(run: Run, batches: list[Batches], lr: float) -> StepResult:
    set_learning_rate(run.optimizer, lr)
    count = num_micro_batches(run.config, run.context.world_size, run.state.consumed_samples)
    try:
        with run.recorder.step(run.state.step + 1, batches, count) as batches_of_step:
            return train_step(
                run.pipeline,
                run.optimizer,
                batches_of_step,
                count,
                run.guard,
                stop_requested=signals.stop_requested,
                save_ready=lambda: run.checkpointer.is_ready,
                before_update=run.saving.wait_until_copied,
            )
    except TrainingError:  # on all ranks; what was begun to be saved is good
        run.saving.finish()
        raise


def _measure(run: Run, result: StepResult, lr: float, samples: int, throughput: Throughput) -> Metrics:
    tokens_per_second, step_time_s = throughput.report()
    speed = speed_metrics(
        run.config,
        run.context,
        run.pipeline.timers,
        tokens_per_second=tokens_per_second,
        step_time_s=step_time_s,
    )
    return {
        "consumed_tokens": run.state.consumed_samples * run.config.data.sequence_length,
        "train/batch_size": samples,
        **step_metrics(run.config, run.context, run.pipeline.model, result),
        **_mark(run.config),
        "train/lr": lr,
        "train/skipped_steps": run.state.skipped_steps,
        **speed,
        **run.saving.take_times(),
    }


def _num_samples(run: Run, source: HeldOut) -> int:
    return min(run.config.evaluation.num_samples or len(source.sequences), len(source.sequences))


def _mark(config: Config) -> Metrics:
    """What tells the numbers of a measurement from those of a training."""
    forced = config.model.forced_routing
    return {} if forced is None else {FORCED_ROUTING: forced.value}


def _evaluate(run: Run) -> Metrics:
    """Of the validation sets, and at the end of the training of the test sets."""
    metrics = _losses(run, "valid", run.datasets.valid)
    if run.state.step == run.config.train.train_steps:
        metrics |= _losses(run, "test", run.datasets.test)
    return metrics


def _losses(run: Run, part: str, sources: list[HeldOut]) -> Metrics:
    """Of each source, also per byte of its text as the paper reports it (table 3, Pile), and their weighted mean."""
    metrics: Metrics = {}
    total = 0.0
    for source in sources:
        count = _num_samples(run, source)
        loss = held_out_loss(run.pipeline, source.sequences, count, run.config.data, run.context.device)
        total += loss * source.weight
        metrics[f"{part}/{source.name}/lm_loss"] = loss
        if source.tokens_per_byte is not None:
            metrics[f"{part}/{source.name}/bits_per_byte"] = loss / math.log(2) * source.tokens_per_byte
    if sources:
        metrics[f"{part}/lm_loss"] = total / sum(source.weight for source in sources)
        run.context.say(evaluation_line(run.state.step, metrics | _mark(run.config)))
    return metrics


def _save(run: Run, agreement: Agreement) -> None:
    """What is to be saved after a step.

    Raises:
        Preempted: a rank was asked to stop, and the step is saved.
        TrainingError: the last step cannot be saved.
    """
    if agreement.saved:
        run.saving.go_on()
    is_last = run.state.step == run.last_step or agreement.stop
    if is_last or run.is_due(run.config.checkpoint.save_interval):
        run.pipeline.gather_weights()
        (run.saving.save_last if is_last else run.saving.save)(run.state)
    if agreement.stop and run.state.step < run.last_step:
        raise Preempted(run.state.step)


def _summarize(run: Run, evaluation: Metrics) -> None:
    """The last lines: where the run stands, and its held-out loss beside what token frequencies alone give.

    `evaluation` is of the last step, empty where no step was left to train.
    """
    say, train_steps = run.context.say, run.config.train.train_steps
    if run.state.step < train_steps:
        say(f"stopped at step {run.state.step:,} of {train_steps:,}; goes on with a larger train.exit_step or none")
        return
    if run.config.model.forced_routing is not None:
        say(f"routing was forced, {run.config.model.forced_routing.value}: losses of this run mean nothing")
    say(f"finished {run.state.step:,} steps in {run.config.run.dir}; another run needs another run.name")
    evaluation = evaluation or _evaluate(run)
    if run.context.is_main and run.datasets.valid:
        loss = evaluation["valid/lm_loss"]
        entropy = unigram_entropy([(s.sequences, _num_samples(run, s), s.weight) for s in run.datasets.valid])
        say(f"held-out loss          {loss:.4f} nats per token")
        say(f"unigram entropy        {entropy:.4f} nats per token, of the same held-out tokens")
        say(f"below unigram entropy  {entropy - loss:.4f} nats")

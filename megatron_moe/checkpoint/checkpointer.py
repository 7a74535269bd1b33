"""Saving and resuming in megatron-core's distributed format, which any layout of the same model can load."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, DistributedOptimizer

from megatron_moe.checkpoint.compatibility import (
    changed_options,
    check_same_data,
    check_same_model,
    check_same_run,
    check_same_schedule,
)
from megatron_moe.checkpoint.coverage import layouts_of, problems_of_coverage
from megatron_moe.checkpoint.dcp import read_index, write_index
from megatron_moe.checkpoint.manifest import rename_for_good, write_manifest
from megatron_moe.checkpoint.optimizer_state import sharded_state
from megatron_moe.checkpoint.reader import damage, load, refuse_damaged
from megatron_moe.checkpoint.run_folder import (
    DAMAGED,
    PARTIAL,
    find_checkpoint,
    plain,
    read_json,
    remove_partial,
    retire,
    saved_config,
    saved_steps,
    superfluous,
)
from megatron_moe.checkpoint.state import TrainState
from megatron_moe.checkpoint.writer import SavePlan, Staging, Written, index_of, plan_save, write
from megatron_moe.config.errors import ConfigError, TrainingError
from megatron_moe.config.schema import Config, ModelConfig, OnDamage, Verify
from megatron_moe.distributed.context import from_main
from megatron_moe.optim.optimizer import set_num_updates

T = TypeVar("T")


class SaveError(OSError):
    """A checkpoint could not be written. The run can go on; the checkpoints before are as they were."""


@dataclasses.dataclass
class PendingSave:
    """A save under way.

    Attributes:
        folder: its final name.
        description: what `state.json` will hold.
        is_copied: set when nothing is read from the model and the optimizer any more.
        written: what this rank has written.
        committed: what rank 0 does when all have written; None before that.
    """

    folder: Path
    description: dict[str, Any]
    is_copied: threading.Event
    written: Future[Written]
    committed: Future[None] | None = None


class Checkpointer:
    """Checkpoints of one run, in `checkpoints/step_NNNNNNNN` of its folder.

    A save is written beside its final name, which it gets when all of it, with a manifest of digests, is on disk: what
    has that name is whole. Every method that saves or loads is for all ranks.
    """

    def __init__(
        self,
        config: Config,
        model: list[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        fingerprints: dict[str, str],
    ) -> None:
        """`fingerprints` are those of the training data, by source."""
        self.config = config
        self.model = model
        self.optimizer = optimizer
        self.fingerprints = fingerprints
        self._plan: SavePlan | None = None
        self._rng_state = torch.get_rng_state()
        self._staging = Staging()
        self._pending: PendingSave | None = None
        self._removals = ThreadPoolExecutor(1, thread_name_prefix="removal")

    @property
    def folder(self) -> Path:
        """All checkpoints of the run."""
        return Path(self.config.run.dir) / "checkpoints"

    @property
    def is_saving(self) -> bool:
        """Whether a save was begun and not finished."""
        return self._pending is not None

    @property
    def is_ready(self) -> bool:
        """Whether this rank is done with what comes next of the save under way."""
        return self._pending is not None and (self._pending.committed or self._pending.written).done()

    def save(self, state: TrainState) -> Path:
        """Save after `state.step` steps.

        Raises:
            SaveError: on all ranks, if any could not write.
        """
        self.begin(state, background=False)
        return self.finish()

    def begin(self, state: TrainState, *, background: bool = True) -> None:
        """Begin to save; `finish` comes later.

        In the background: `wait_until_copied` comes before the next update, and `go_on` when all ranks are ready.

        Raises:
            SaveError: the folder cannot be made.
            TrainingError: the weights of a rank are not finite, and will never be again.
        """
        if broken := _ranks_with_broken_weights(self.model):
            raise TrainingError(
                f"step {state.step:,}: weights of ranks {broken} are not finite; nothing is saved of them. The last "
                "checkpoint stands, and the same command goes on from it"
            )
        folder = self.folder / f"step_{state.step:08}"
        partial = folder.with_suffix(PARTIAL)
        from_main(lambda: _make_anew(partial))
        plan = self._planned()
        description = {
            **dataclasses.asdict(state),
            "world_size": dist.get_world_size(),
            "data": self.fingerprints,
            "config": plain(self.config),
        }
        is_copied = threading.Event()
        written = _in_thread(lambda: write(self._copied(plan, is_copied) if background else plan, partial))
        written.add_done_callback(lambda _: is_copied.set())  # however it ended
        self._pending = PendingSave(folder, description, is_copied, written)

    def _planned(self) -> SavePlan:
        """What to write, found out by the first save: the tensors stay the same, and change in place."""
        self._rng_state.copy_(torch.get_rng_state())
        if self._plan is None or not self._plan.is_fixed:
            self._plan = plan_save(self.sharded_state_dict())
        return self._plan

    def _copied(self, plan: SavePlan, is_copied: threading.Event) -> SavePlan:
        copy = self._staging.copy(plan)
        is_copied.set()
        return copy

    def wait_until_copied(self) -> None:
        """Return once nothing of the save under way is read from the model and the optimizer any more."""
        if self._pending is not None:
            self._pending.is_copied.wait()

    def finish(self) -> Path:
        """Wait until all ranks have written, and give the checkpoint its name.

        Raises:
            SaveError: on all ranks, if any could not write.
        """
        if self._pending.committed is None:
            self._collect()
        pending, self._pending = self._pending, None
        from_main(pending.committed.result)
        return pending.folder

    def go_on(self) -> Path | None:
        """As `finish`, but in two parts, so that the training need not wait; called when all ranks are ready.

        Returns:
            The checkpoint, when it has its name.

        Raises:
            SaveError: on all ranks, if any could not write.
        """
        if self._pending.committed is not None:
            return self.finish()
        self._collect()
        return None

    def _collect(self) -> None:
        """Tell rank 0 what all have written, which begins to commit it."""
        pending = self._pending
        try:
            mine: Written | str = pending.written.result()
        except Exception as error:  # of whatever kind: the other ranks wait
            mine = f"rank {dist.get_rank()}: {error}"
        parts: list[Any] = [None] * dist.get_world_size()
        is_main = dist.get_rank() == 0
        dist.gather_object(mine, parts if is_main else None)
        try:
            from_main(lambda: _refuse_failures(pending, parts))
        except SaveError:
            self._pending = None
            raise
        pending.committed = _in_thread(lambda: self._commit(pending, parts) if is_main else None)

    def _commit(self, pending: PendingSave, parts: list[Written]) -> None:
        partial = pending.folder.with_suffix(PARTIAL)
        with _removed_on_failure(pending):
            write_index(partial, index_of(self._plan, parts))
            (partial / "state.json").write_text(json.dumps(pending.description, indent=1), encoding="utf-8")
            if lost := problems_of_coverage(layouts_of(read_index(partial)), self.config.model):
                raise SaveError("; ".join(lost))
            write_manifest(partial, {name: entry for part in parts for name, entry in part.files.items()})
            if pending.folder.exists():
                self._remove(pending.folder)
            rename_for_good(partial, pending.folder)
        with contextlib.suppress(OSError):  # what stays only takes room
            for old in superfluous(self.folder, self.config.checkpoint.keep_last, self.config.checkpoint.keep_every):
                self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """At once none of the run's; its bytes go while the training goes on."""
        self._removals.submit(shutil.rmtree, retire(checkpoint), ignore_errors=True)

    def load_latest(self) -> tuple[TrainState, list[str]]:
        """Load the newest checkpoint, or where there is none the weights of `checkpoint.init_from`.

        Returns:
            Where the run stands, and what the user should know: damaged checkpoints, options that have changed.

        Raises:
            ConfigError: the checkpoint is damaged, of another model, of other data or of another schedule.
            OSError: on all ranks, if any cannot read for now; no checkpoint is passed over for it.
        """
        checkpoint, notes = self._newest_whole()
        if checkpoint is None:
            if self.config.checkpoint.init_from is not None:
                init_from = Path(self.config.checkpoint.init_from)
                source = from_main(lambda: find_checkpoint(init_from))
                load_weights(self.model, source, self.config.model, self.config.checkpoint.verify)
                self.optimizer.reload_model_params()
            return TrainState(), notes
        description = from_main(lambda: read_json(checkpoint / "state.json"))
        saved = plain(from_main(lambda: saved_config(checkpoint)))
        if description.get("weights_only"):
            raise ConfigError(
                f"run.dir={self.config.run.dir}: holds an imported model, weights only; start another run with "
                f"checkpoint.init_from={self.config.run.dir} and another run.name"
            )
        check_same_run(saved, self.config)
        check_same_schedule(saved, self.config)
        check_same_data(description.get("data", {}), self.fingerprints, checkpoint)
        state = TrainState.read(description, checkpoint / "state.json")
        self._load(checkpoint, state, with_rng=description.get("world_size") == dist.get_world_size())
        changes = [f"changed since the checkpoint: {change}" for change in changed_options(saved, self.config)]
        return state, notes + changes

    def _newest_whole(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from; damaged ones are passed over only where the user allows it."""
        remedy = "checkpoint.on_damage=previous goes on from the checkpoint before"
        damaged: dict[Path, list[str]] = {}
        for checkpoint in from_main(self._saved):
            problems = damage(checkpoint, self.config.checkpoint.verify)
            if not problems:
                from_main(lambda: _set_aside(damaged))
                return checkpoint, [
                    f"passed over: {'; '.join(lines)}; kept as {path.name}{DAMAGED}" for path, lines in damaged.items()
                ]
            if self.config.checkpoint.on_damage is OnDamage.stop:
                raise ConfigError(*problems, f"{checkpoint}: is not used; {remedy}")
            damaged[checkpoint] = problems
        if damaged:  # they keep their names, so that no later start begins anew
            none_left = f"run.dir={self.config.run.dir}: no checkpoint is left; start another run with run.name=NEW"
            raise ConfigError(*(line for lines in damaged.values() for line in lines), none_left)
        return None, []

    def _saved(self) -> list[Path]:
        """Newest first, after cleaning up."""
        remove_partial(self.folder)
        return saved_steps(self.folder)[::-1]

    def _load(self, checkpoint: Path, state: TrainState, *, with_rng: bool) -> None:
        request = self.sharded_state_dict(with_rng=with_rng)
        load(request, checkpoint)
        for part in self._optimizer_parts():
            set_num_updates(part, state.step - state.skipped_steps)
        if with_rng:
            torch.set_rng_state(self._rng_state)

    def sharded_state_dict(self, *, with_rng: bool = True) -> dict[str, Any]:
        """This rank's tensors, not copies, with their names and places in the whole model."""
        state: dict[str, Any] = {name: chunk.sharded_state_dict() for name, chunk in _named_chunks(self.model)}
        state["optimizer"] = [sharded_state(part, state) for part in self._optimizer_parts()]
        if with_rng:
            place = (0, dist.get_rank(), dist.get_world_size())
            state["rng"] = ShardedTensor.from_rank_offsets("rng", self._rng_state[None], place)
        return state

    def _optimizer_parts(self) -> list[DistributedOptimizer]:
        """Of this rank; the experts' has nothing on a stage without experts."""
        return [part for part in self.optimizer.chained_optimizers if part.optimizer.state]


def load_weights(
    model: list[torch.nn.Module], checkpoint: Path, expected: ModelConfig, verify: Verify = Verify.full
) -> None:
    """Load the parameters of a checkpoint of the same architecture, whatever its layout; on all ranks.

    Args:
        model: chunks of this rank, with or without their data-parallel wrapper.
        checkpoint: a folder `step_NNNNNNNN`.
        expected: of `model`.
        verify: what of the checkpoint is compared with its manifest first.

    Raises:
        ConfigError: the checkpoint is damaged, or of another architecture.
    """
    refuse_damaged(checkpoint, verify)
    check_same_model(from_main(lambda: saved_config(checkpoint)).model, expected, checkpoint)
    load({name: chunk.sharded_state_dict() for name, chunk in _named_chunks(model)}, checkpoint)


@contextlib.contextmanager
def _removed_on_failure(pending: PendingSave) -> Iterator[None]:
    """Leave nothing of a save that fails."""
    try:
        yield
    except Exception as error:  # of whatever kind: the other ranks wait
        shutil.rmtree(pending.folder.with_suffix(PARTIAL), ignore_errors=True)
        raise SaveError(f"{pending.folder}: {error}") from error


def _refuse_failures(pending: PendingSave, parts: list[Written | str]) -> None:
    if failures := [part for part in parts if isinstance(part, str)]:
        with _removed_on_failure(pending):
            raise SaveError("; ".join(failures))


def _in_thread(function: Callable[[], T]) -> Future[T]:
    """Call in a thread that does not keep a process alive which has failed."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint", daemon=True).start()
    return future


def _named_chunks(model: list[torch.nn.Module]) -> list[tuple[str, torch.nn.Module]]:
    """megatron-core's own names for virtual stages, which its optimizer expects."""
    chunks = [chunk.module if isinstance(chunk, DistributedDataParallel) else chunk for chunk in model]
    if len(chunks) == 1:
        return [("model", chunks[0])]
    return [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _ranks_with_broken_weights(model: list[DistributedDataParallel]) -> list[int]:
    """Whose weights hold nan or inf: never worth a checkpoint, which others would have to make room for."""
    norm = torch.nn.utils.get_total_norm([param.detach() for chunk in model for param in chunk.parameters()])
    flags = torch.zeros(dist.get_world_size(), device=norm.device)
    flags[dist.get_rank()] = not torch.isfinite(norm)
    dist.all_reduce(flags)
    return flags.nonzero().flatten().tolist()


def _make_anew(partial: Path) -> None:
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        raise SaveError(f"{partial}: {error.strerror}") from error


def _set_aside(checkpoints: Iterable[Path]) -> None:
    """Keep damaged checkpoints under names that are no checkpoint's."""
    for checkpoint in checkpoints:
        aside = checkpoint.with_suffix(DAMAGED)
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)

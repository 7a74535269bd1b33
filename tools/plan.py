"""What a run needs and how long it takes, before it costs anything.

python tools/plan.py [GROUP=CHOICE] [OPTION=VALUE] ... [cluster=CHOICE] [cluster.num_gpus=N]

The options are those of pretrain.py, and `cluster` (conf/cluster). With model=NAME but no experiment the recipe
experiment=NAME is planned, where there is one. --search tries layouts; of these, the options that are given stay.
--calibrate fits a cluster to runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

from megatron_moe.checkpoint.run_folder import plain
from megatron_moe.config.cluster import PlanConfig
from megatron_moe.config.derived import num_chunks, required_world_size
from megatron_moe.config.errors import ConfigError, exit_code_of
from megatron_moe.config.load import CONF_DIR, compose_plan
from megatron_moe.config.schema import ParallelConfig
from megatron_moe.plan.estimate import FORMULAS, Plan, checked, estimate, not_estimated
from megatron_moe.plan.hardware import measured, of_a_rank
from megatron_moe.plan.pipeline import layers_per_chunk
from megatron_moe.plan.recompute import describe_recompute
from megatron_moe.plan.search import RECOMPUTE, Found, Search, search
from tools.planning.calibrate import calibrate
from tools.planning.choices import new_choice

GIB, GB = 2**30, 1e9
WIDTH = 160
SHOWN = 10  # layouts of a search
SHORT = {
    "tensor_model_parallel_size": "TP",
    "pipeline_model_parallel_size": "PP",
    "virtual_pipeline_model_parallel_size": "VPP",
    "context_parallel_size": "CP",
    "expert_model_parallel_size": "EP",
    "expert_tensor_parallel_size": "ETP",
}


def main(argv: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="OPTION=VALUE", help="as pretrain.py takes them, and cluster")
    parser.add_argument("--search", action="store_true", help="layouts that fit, the fastest first")
    parser.add_argument(
        "--calibrate", metavar="RUN", type=Path, action="append", help="fit the cluster to a run's folder; repeatable"
    )
    parser.add_argument("--emit", metavar="NAME", help="write the fastest, for parallel=NAME, or the fitted cluster")
    parser.add_argument("--config-dir", type=Path, help="folder of further choices; --emit writes there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with memory and a time line")
    parser.add_argument("--published", action="store_true", help="compare the formulas with published figures")
    args = parser.parse_intermixed_args(argv)
    return exit_code_of(lambda: run(args))


def run(args: argparse.Namespace) -> None:
    """Plan, search, calibrate or compare."""
    if args.emit and not ((args.search or args.calibrate) and args.config_dir):
        raise ConfigError(f"--emit {args.emit}: needs --search or --calibrate, and --config-dir FOLDER to write to")
    if args.published:
        print_published()
    elif args.calibrate:
        calibrate(composed(args).cluster, args)
    elif args.search:
        run_search(args)
    else:
        run_estimate(args)


def run_estimate(args: argparse.Namespace) -> None:
    """Estimate one layout, and show it."""
    config = load(args)
    plan = estimate(config)
    if args.json:
        print(json.dumps(as_json(config, plan), default=str))
    else:
        print_plan(config, plan)
    if args.html:
        from megatron_moe.report.plan_page import plan_page

        rows = [
            *((what, value, FORMULAS[formula].text) for what, value, formula in facts(config, plan)),
            *inputs(config),
        ]
        args.html.write_text(plan_page(title_of(config, plan), plan, rows), encoding="utf-8")
        if not args.json:
            print(f"wrote {args.html}")


def run_search(args: argparse.Namespace) -> None:
    """Try layouts, show the fastest, and write the first."""
    config = load(args)
    if config.cluster.num_gpus is None:
        raise ConfigError("cluster.num_gpus=null: must be given with --search")
    pinned = {override.partition("=")[0].lstrip("+") for override in args.overrides}
    if "parallel" in pinned:
        raise ConfigError("parallel: is what --search chooses; hold parallel.OPTION=VALUE, or leave out --search")
    result = search(config, config.cluster.num_gpus, pinned)
    if args.json:
        found = [layout(one) for one in result.found[:SHOWN]]
        print(json.dumps({"tried": result.tried, "found": found, "refused": dict(result.refused)}))
    else:
        print_search(config, result)
    if args.emit:
        if not result.found:
            raise ConfigError(f"--emit {args.emit}: no layout fits")
        emit(args, config, result.found[0])


def composed(args: argparse.Namespace) -> PlanConfig:
    """The configuration as it is written."""
    overrides = with_recipe(args.overrides)
    if args.config_dir and not args.config_dir.is_dir() and not args.emit:
        raise ConfigError(f"--config-dir {args.config_dir}: no such folder")
    if args.config_dir and args.config_dir.is_dir():
        overrides = [f"hydra.searchpath=['file://{args.config_dir.resolve()}']", *overrides]
    return compose_plan(overrides)


def load(args: argparse.Namespace) -> PlanConfig:
    """The checked configuration, on this machine with its rates measured."""
    config = composed(args)
    ranks = config.cluster.num_gpus or required_world_size(config.parallel)
    config.cluster = of_a_rank(measured(config.cluster), ranks)
    return checked(config)


def with_recipe(overrides: list[str]) -> list[str]:
    """With the recipe of the model, if neither is an experiment given nor its group changed."""
    chosen = dict(override.split("=", 1) for override in overrides if "=" in override)
    recipe = CONF_DIR / "experiment" / f"{chosen.get('model')}.yaml"
    is_wanted = "experiment" not in chosen and recipe.is_file()
    return [f"experiment={recipe.stem}", *overrides] if is_wanted else overrides


def facts(config: PlanConfig, plan: Plan) -> Iterator[tuple[str, str, str]]:
    """What, how much, and the name of its formula."""
    length = config.data.sequence_length
    fullest = max(plan.memory, key=lambda stage: stage.total)
    total, activated = (sum(part[i] for part in plan.params.values()) for i in range(2))
    yield "parameters", f"{total:,}, activated {activated:,}", "parameters"
    paper = plan.paper_flops_per_token
    yield (
        "FLOPs a token",
        f"{plan.flops_per_token / GB:,.2f} G (Megatron)"
        + (f", {paper / GB:,.2f} G (paper), sequences of {length}" if paper else f", sequences of {length}"),
        "FLOPs per token",
    )
    for name in ("weights", "gradients", "optimizer", "activations", "logits", "dispatch"):
        yield f"{name}, fullest stage", f"{getattr(fullest, name) / GIB:.2f} GiB", name
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    yield "memory, fullest stage", f"{fullest.total / GIB:.2f} of {plan.memory_limit / GIB:.2f} GiB: {verdict}", "limit"
    for name, traffic in plan.traffic.items():
        if traffic.total:
            sent = f"{traffic.inside / GB:,.1f} GB inside nodes, {traffic.between / GB:,.1f} GB between"
            yield f"{name.replace('_', '-')} traffic a step", sent, name
    other = "" if plan.zero_bubble is None else f"; {plan.zero_bubble:.1%} with zero-bubble, not in megatron-core"
    yield "bubble, slowest stage", f"{plan.bubble:.1%} of its busy time{other}", "bubble"
    busy = ", ".join(f"{name.replace('_', '-')} {time:.3g}" for name, time in plan.busy.items() if time)
    step = plan.step
    yield (
        "step",
        f"{step.total:.3g} s: passes {step.pipeline:.3g} (busy: {busy}), data-parallel {step.data_parallel:.2g}, "
        f"optimizer {step.optimizer:.2g}",
        "step time",
    )
    yield "speed", f"{plan.tokens_per_second_per_gpu:,.0f} tokens/s/GPU, MFU {plan.mfu:.1%}", "speed"
    yield "run", f"{plan.tokens:,.0f} tokens: {plan.days:,.1f} days, {plan.gpu_hours:,.0f} GPU-hours", "run"
    saved = plan.checkpoint
    yield (
        "checkpoint",
        f"{saved.size / GB:,.1f} GB in {saved.seconds:,.1f} s; one every {saved.interval / 60:,.0f} min, "
        f"{max(1, round(saved.interval / step.total)):,} steps",
        "checkpoint",
    )
    if options := not_estimated(config):
        yield "not estimated", ", ".join(options), "not estimated"


def inputs(config: PlanConfig) -> Iterator[tuple[str, str, str, str]]:
    """What no data sheet gives: name, value, where it is from, and the estimates that rest on it."""
    cluster = config.cluster
    for name in dict.fromkeys(name for formula in FORMULAS.values() for name in formula.inputs):
        source = "calibrated" if name in cluster.calibrated else "assumed"
        used_by = [what for what, formula in FORMULAS.items() if name in formula.inputs]
        yield f"cluster.{name}", f"{getattr(cluster, name):g}", source, ", ".join(used_by)


def title_of(config: PlanConfig, plan: Plan) -> str:
    """Model, GPUs and layout in a line."""
    sizes = [f"{SHORT[name]} {size}" for name, size in vars(config.parallel).items() if name in SHORT and size]
    layers = f", layers {layers_per_chunk(config.model, config.parallel)}" if num_chunks(config.parallel) > 1 else ""
    batch = f"micro batch {config.train.micro_batch_size} of {config.train.global_batch_size:,}"
    again = f", recompute {describe_recompute(config.recompute)}" if config.recompute.granularity else ""
    return f"{config.model.name} on {plan.num_gpus} x {config.cluster.name}: {', '.join(sizes)}{layers}, {batch}{again}"


def print_plan(config: PlanConfig, plan: Plan) -> None:
    """All estimates as tables."""
    console = Console(width=WIDTH, highlight=False)
    console.print(title_of(config, plan), markup=False)
    console.print(parts_table(plan), memory_table(plan))
    estimates = Table("estimate", "", "formula", box=None)
    for what, value, formula in facts(config, plan):
        estimates.add_row(what, value, FORMULAS[formula].text)
    table = Table("input", "", "", "of", box=None)
    for row in inputs(config):
        table.add_row(*row)
    console.print(estimates, table)


def parts_table(plan: Plan) -> Table:
    """Parameters by part of the model."""
    table = Table("parameters of", "total", "activated", box=None)
    for name, (total, activated) in plan.params.items():
        table.add_row(name, f"{total:,}", f"{activated:,}")
    return table


def memory_table(plan: Plan) -> Table:
    """GiB of each stage, by what for."""
    names = [field.name for field in dataclasses.fields(plan.memory[0])]
    table = Table("stage", "parameters a rank", *names, "GiB", "of the limit", box=None)
    for stage, (memory, params) in enumerate(zip(plan.memory, plan.rank_params, strict=True)):
        parts = [f"{getattr(memory, name) / GIB:.2f}" for name in names]
        share = f"{memory.total / plan.memory_limit:.0%}"
        table.add_row(str(stage), f"{params.total:,}", *parts, f"{memory.total / GIB:.2f}", share)
    return table


def as_json(config: PlanConfig, plan: Plan) -> dict[str, Any]:
    """The estimates but for the time line, with their formulas; bytes, seconds and FLOPs."""
    without = dataclasses.replace(plan, timeline=[])
    return {
        **dataclasses.asdict(without),
        "fits": plan.fits,
        "days": plan.days,
        "gpu_hours": plan.gpu_hours,
        "parallel": dataclasses.asdict(config.parallel),
        "recompute": plain(config.recompute),
        "micro_batch_size": config.train.micro_batch_size,
        "not_estimated": not_estimated(config),
        "cluster": plain(config.cluster),
        "formulas": {name: dataclasses.asdict(formula) for name, formula in FORMULAS.items()},
    }


def layout(found: Found) -> dict[str, Any]:
    """What a search tells of a layout."""
    parallel = found.config.parallel
    return {
        **{short: getattr(parallel, name) for name, short in SHORT.items()},
        "micro batch": found.config.train.micro_batch_size,
        "recompute": describe_recompute(found.config.recompute),
        "layers": parallel.pipeline_layout,
        "GiB": round(found.memory / GIB, 1),
        "step, s": round(found.step_s, 3),
        "tokens/s/GPU": round(found.tokens_per_second_per_gpu),
    }


def print_search(config: PlanConfig, result: Search) -> None:
    """The fastest layouts, and why others are not among those that fit."""
    console = Console(width=WIDTH, highlight=False)
    cluster = config.cluster
    console.print(f"{config.model.name} on {cluster.num_gpus} x {cluster.name}", markup=False)
    console.print(f"{result.tried:,} layouts tried, {len(result.found):,} fit", markup=False)
    if result.found:
        table = Table(*layout(result.found[0]), box=None)
        for found in result.found[:SHOWN]:
            table.add_row(*("" if value is None else f"{value}" for value in layout(found).values()))
        console.print(table)
    reasons = Table("layouts", "why not", box=None)
    for reason, count in result.refused.most_common():
        reasons.add_row(f"{count:,}", reason)
    console.print(reasons)


def emit(args: argparse.Namespace, asked: PlanConfig, found: Found) -> None:
    """Write a layout as a choice of `parallel`, and say how to run it."""
    path = new_choice(args.config_dir, "parallel", args.emit)
    default = ParallelConfig()
    chosen = {name: value for name, value in vars(found.config.parallel).items() if value != getattr(default, name)}
    title = f"# {found.config.model.name} on {found.config.cluster.num_gpus} x {found.config.cluster.name}, by a search"
    path.write_text("\n".join([title, *(f"{name}: {value}" for name, value in chosen.items())]) + "\n")
    options = [override for override in with_recipe(args.overrides) if not override.startswith(("cluster", "parallel"))]
    command = ["python", "pretrain.py", "--config-dir", str(args.config_dir), *options, f"parallel={args.emit}"]
    if found.config.recompute != asked.recompute:
        command += [f"recompute={name}" for name, choice in RECOMPUTE.items() if choice == found.config.recompute]
    micro_batch = f"train.micro_batch_size={found.config.train.micro_batch_size}"
    print(f"wrote {path}; {shlex.join([*command, micro_batch])}")


def print_published() -> None:
    """The published figures beside ours."""
    from megatron_moe.plan.published import published_figures

    table = Table("what", "published", "predicted", "error", "", box=None)
    for figure in published_figures():
        held = ("holds" if figure.holds else "DIFFERS") if figure.tested else "not tested"
        kind = "an input is fitted to it" if figure.fitted else held
        digits = len(figure.published.partition(".")[2])
        table.add_row(figure.what, figure.published, f"{figure.predicted:,.{digits}f}", f"{figure.relative:+.2%}", kind)
    Console(width=WIDTH, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())

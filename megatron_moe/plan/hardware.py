"""Rates of GPUs, from conf/cluster, and of this machine, measured. Imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import time
from collections.abc import Callable

import numpy as np
from omegaconf import OmegaConf

from megatron_moe.config.cluster import ClusterConfig
from megatron_moe.config.load import CONF_DIR

MATRIX = 1536  # rows and columns of the product that is measured, in fp32
COPIED = 2**27  # bytes that are copied, more than caches hold


def peak_flops(device_name: str) -> float | None:
    """FLOP/s of a GPU in bf16 without sparsity; None: not known, as of a slice of one (MIG)."""
    found = [words for words in _peaks() if re.search(rf"\b{words}\b", device_name)]
    if "MIG" in device_name or not found:
        return None
    return _peaks()[max(found, key=len)]


@functools.cache
def _peaks() -> dict[str, float]:
    """By words of the driver's name for a GPU; those of a variant are longer than those of all."""
    clusters = [OmegaConf.load(path) for path in sorted((CONF_DIR / "cluster").glob("*.yaml"))]
    return {words: cluster.peak_flops for cluster in clusters for words in cluster.device_names}


SHARED = ("peak_flops", "memory_bytes", "memory_bandwidth", "intra_node_bandwidth")


def measured(cluster: ClusterConfig) -> ClusterConfig:
    """The cluster with what it leaves open measured on this machine."""
    measures: dict[str, Callable[[], float]] = {
        "peak_flops": _product_rate,
        "memory_bytes": lambda: float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        "memory_bandwidth": lambda: 2 * _copy_rate(),  # read and written
        "intra_node_bandwidth": _copy_rate,  # gloo copies through memory
    }
    rates = {name: measure() for name, measure in measures.items() if getattr(cluster, name) is None}
    return dataclasses.replace(cluster, **rates)


def of_a_rank(cluster: ClusterConfig, ranks: int) -> ClusterConfig:
    """A rank's part of what `ranks` share."""
    if not cluster.shared:
        return cluster
    return dataclasses.replace(cluster, shared=False, **{name: getattr(cluster, name) / ranks for name in SHARED})


def _product_rate() -> float:
    matrix = np.ones((MATRIX, MATRIX), dtype=np.float32)
    return 2 * MATRIX**3 / _fastest_s(lambda: matrix @ matrix)


def _copy_rate() -> float:
    source, target = np.ones(COPIED, dtype=np.uint8), np.ones(COPIED, dtype=np.uint8)
    return COPIED / _fastest_s(lambda: np.copyto(target, source))


def _fastest_s(work: Callable[[], object], repeat: int = 5) -> float:
    seconds = []
    for _ in range(repeat):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

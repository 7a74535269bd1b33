# shellcheck shell=bash
# The environment of every rank; sourced on each node, in the container if there is one. Prints nothing.

# The virtual environment: VENV, or the one that `make` sets up; in a container the image's own Python.
# shellcheck disable=SC1091
if [[ -z ${CONTAINER_IMAGE:-} && -f ${VENV:=.venv}/bin/activate ]]; then source "$VENV/bin/activate"; fi

# A line is in the log when it is printed, not when a buffer is full or, after a crash, never.
export PYTHONUNBUFFERED=1

# NCCL says why it failed; with INFO also which network and which path between GPUs it chose.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# PyTorch grows blocks of GPU memory in place: experts get another number of tokens each step, which leaves gaps.
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"

# Kernels start in the order they are given: megatron-core counts on it where transfers overlap with computation
# (tensor_parallel/layers.py:526).
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"

# Nodes with several networks: name the one between them, such as bond0, where NCCL and gloo choose another.
# export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0

"""Imported once by the fork server, so that a rank starts in a fraction of a second."""

import warnings

warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.distributed")

import megatron_moe.train.loop  # noqa: E402, F401

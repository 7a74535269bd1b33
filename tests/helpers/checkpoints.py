"""Checkpoints edited as somebody would who also renews the manifest: what then stands in the way is not the digest."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_moe.checkpoint.manifest import MANIFEST, write_manifest


def sign(checkpoint: Path) -> None:
    """Write the manifest of what is there, as an attacker would."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)
    write_manifest(checkpoint)


def replace_file(checkpoint: Path, name: str, data: bytes) -> None:
    """Give a file of a checkpoint other bytes, and the manifest their digest."""
    (checkpoint / name).write_bytes(data)
    sign(checkpoint)


def edit_state(checkpoint: Path, **changes: object) -> None:
    """Change entries of `state.json`; a value for "config" is merged into the group it names."""
    state = json.loads((checkpoint / "state.json").read_text())
    for group, options in changes.pop("config", {}).items():
        state["config"][group] |= options
    replace_file(checkpoint, "state.json", json.dumps({**state, **changes}).encode())

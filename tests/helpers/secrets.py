"""Keys as users have them in their environment, and where they turn up."""

from __future__ import annotations

import base64
from pathlib import Path

SECRETS = {
    "WANDB_API_KEY": "0c1e5a7b" * 5,
    "HF_TOKEN": "hf_CanaryHfToken0123456789abcdefghij",
    "HUGGING_FACE_HUB_TOKEN": "hf_CanaryHubToken0123456789abcdefgh",
    "AWS_ACCESS_KEY_ID": "AKIACANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "CanaryAws/0123456789+abcdefghijklmnopqrs",
}


def files_with(text: str, folder: Path) -> list[str]:
    """Files that hold a text, plain or in base64."""
    forms = [text.encode(), base64.b64encode(text.encode()).rstrip(b"=")]
    return [
        str(path)
        for path in folder.rglob("*")
        if path.is_file() and any(form in path.read_bytes() or text in str(path) for form in forms)
    ]

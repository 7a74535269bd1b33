"""The tokenizer of an exported or imported model: `tokenizer.json`, and what transformers needs to load it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megatron_moe.checkpoint.run_folder import read_json
from megatron_moe.config.errors import ConfigError
from megatron_moe.data.tokenizer import BEGIN_OF_SENTENCE, end_of_document, load_tokenizer, num_ids, tokenizer_file
from megatron_moe.files import write_json

FILE = "tokenizer.json"
BEGINNINGS = (BEGIN_OF_SENTENCE, "<s>", "<|begin_of_text|>")


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer that fits a model, with its special tokens; padding is the end of a sentence, as in the releases."""

    path: Path
    bos: str | None
    bos_id: int | None
    eos: str
    eos_id: int

    def write(self, folder: Path, sequence_length: int) -> None:
        """Write what `AutoTokenizer` loads without remote code."""
        shutil.copyfile(self.path, folder / FILE)
        self.write_settings(folder, model_max_length=sequence_length)

    def write_settings(self, folder: Path, **more: int) -> None:
        """Write the names of the special tokens, for transformers."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.eos,
            "clean_up_tokenization_spaces": False,
            **more,
        }
        write_json(folder / "tokenizer_config.json", config)


def open_tokenizer(path: Path, vocab_size: int) -> TokenizerFile:
    """A `tokenizer.json`, given itself or its folder.

    Raises:
        ConfigError: it is none, has no end of a sentence, or has ids that the model has not.
    """
    tokenizer = load_tokenizer(path)
    if num_ids(tokenizer) > vocab_size:
        raise ConfigError(
            f"tokenizer {path}: has ids up to {num_ids(tokenizer) - 1:,}; the model's vocab_size is {vocab_size:,}"
        )
    eos_id = end_of_document(tokenizer)
    bos = next((name for name in BEGINNINGS if tokenizer.token_to_id(name) is not None), None)
    return TokenizerFile(
        path=tokenizer_file(path),
        bos=bos,
        bos_id=None if bos is None else tokenizer.token_to_id(bos),
        eos=tokenizer.id_to_token(eos_id),
        eos_id=eos_id,
    )


def find_tokenizer(folder: Path, given: Path | None, vocab_size: int) -> TokenizerFile | None:
    """The tokenizer that the user gave, else that of a folder, if it has one.

    Raises:
        ConfigError: the folder's tokenizer is Python code, which is not run.
    """
    if given is not None or (folder / FILE).is_file():
        return open_tokenizer(given or folder, vocab_size)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings):
        raise ConfigError(
            f"{settings}: auto_map: the tokenizer is Python code, which is not run; give a {FILE} with --tokenizer"
        )
    return None

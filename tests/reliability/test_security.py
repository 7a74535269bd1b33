"""What comes from files and from the command line is read, never run, and stays where it belongs."""

import ast
import json
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from megatron_moe.checkpoint.run_folder import plain, saved_config
from megatron_moe.config.errors import ConfigError
from megatron_moe.config.load import compose_config
from megatron_moe.config.validate import validate
from megatron_moe.data.cache import ArrayCache
from megatron_moe.data.dataset import examine
from megatron_moe.data.indexed import HEADER, IndexedWriter
from megatron_moe.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_moe.hugging_face.safetensors import read_header
from megatron_moe.hugging_face.tokenizer import find_tokenizer
from megatron_moe.train.restore import read_config
from tests.helpers.canary import Canary
from tests.helpers.cli import ROOT, run_cli
from tests.helpers.ranks import run_ranks
from tests.helpers.secrets import SECRETS, files_with
from tests.helpers.training import TINY, tiny_config

SOURCES = [*sorted((ROOT / "megatron_moe").rglob("*.py")), *sorted((ROOT / "tools").glob("*.py")), ROOT / "pretrain.py"]

# --- Nothing is instantiated from a configuration

CANARY = "{_target_: logging.FileHandler, filename: canary}"  # makes a file where it is called
HANDLERS = "hydra.job_logging.handlers={x: {class: logging.FileHandler, filename: canary}}"


@pytest.mark.parametrize(
    "arguments",
    [
        [f"+hydra.callbacks.x={CANARY}"],
        [f"+hydra.callbacks.x={CANARY}", "--cfg=job"],
        ["-m", "train.seed=1,2", f"+hydra.sweeper.x={CANARY}"],
        [f"+{HANDLERS}", "hydra.job_logging.root={handlers: [x]}"],
        ["--config-dir=mine", "experiment=mine"],
        [f"++model={CANARY}"],
        [f"++data.train=[{CANARY}]", "data=blend"],
    ],
    ids=lambda arguments: arguments[-1][:40],
)
def test_what_a_configuration_names_is_not_called(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "mine.yaml").write_text(
        f"# @package _global_\nhydra:\n  callbacks:\n    x: {CANARY}\n"
    )
    # Flags first; -1, so that it ends in any case.
    command = sorted(["train.train_steps=-1", *arguments], key=lambda argument: not argument.startswith("-"))
    result = run_cli("pretrain.py", *command, cwd=tmp_path)
    assert result.returncode == 2
    assert any(text in result.stderr for text in ("_target_=logging", "'_target_' not in", "Hydra would call"))
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--experimental-r"])
def test_the_flag_of_hydra_that_reads_a_pickle_is_refused(flag: str, tmp_path: Path) -> None:
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    result = run_cli("pretrain.py", f"{flag}=job.pickle", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --experimental-rerun=job.pickle: is refused")
    assert not (tmp_path / "canary").exists()


def test_no_variable_comes_from_a_configuration(tmp_path: Path) -> None:
    result = run_cli("pretrain.py", "+hydra.job.env_set.LD_PRELOAD=x.so", "train.train_steps=-1", cwd=tmp_path)
    assert result.returncode == 2
    assert "hydra.job.env_set={'LD_PRELOAD': 'x.so'}: must be empty" in result.stderr


@pytest.mark.parametrize("group", ["model", "data", "logger"])
def test_a_saved_configuration_that_names_code_is_refused(group: str, tmp_path: Path) -> None:
    saved = plain(tiny_config())
    saved[group] |= {"_target_": "logging.FileHandler", "filename": str(tmp_path / "canary")}
    (tmp_path / "state.json").write_text(json.dumps({"step": 1, "config": saved}))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    for read, file in ((saved_config, "state.json"), (read_config, "config.yaml")):
        with pytest.raises(ConfigError) as error:
            read(tmp_path)
        problem = f"{tmp_path / file}: {group}._target_=logging.FileHandler: there is no such option"
        assert error.value.problems[0] == problem
        assert len(error.value.problems) == 2
    assert not (tmp_path / "canary").exists()


def test_a_yaml_tag_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model: !!python/object/apply:pathlib.Path.touch ['{tmp_path}/canary']\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: no YAML"):
        read_config(tmp_path)
    assert not (tmp_path / "canary").exists()


# --- The code base has no call that runs what it reads

FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "importlib.import_module", "os.system", "os.popen"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "dill.load", "joblib.load"),
    *("yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all"),
    *("hydra.utils.instantiate", "hydra.utils.call", "instantiate"),
}
FORBIDDEN_IMPORTS = {"hydra.utils", "marshal", "dill", "joblib", "shelve"}
ONLY_AS_MODULES = {"pickle", "yaml"}  # so that their functions are called by names that are looked for
FORBIDDEN_VALUES = {"weights_only": False, "trust_remote_code": True, "allow_pickle": True, "shell": True}


def dangers(source: str) -> list[str]:
    """Calls and imports that run what is read, or could."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
            wrong = [key for key, value in FORBIDDEN_VALUES.items() if key in given and given[key] is value]
            if name in FORBIDDEN_CALLS or wrong or (name == "torch.load" and given.get("weights_only") is not True):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_IMPORTS | ONLY_AS_MODULES:
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.ClassDef) and any("Unpickler" in ast.unparse(base) for base in node.bases):
            methods = {method.name for method in node.body if isinstance(method, ast.FunctionDef)}
            found += [] if "find_class" in methods else [f"class {node.name}"]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_read_is_run(path: Path) -> None:
    assert dangers(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "pickle.loads(data)",
        "pickle.Unpickler(file).load()",
        "from pickle import loads",
        "class Reader(pickle.Unpickler):\n    pass",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "dist_checkpointing.load(x, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "from hydra.utils import instantiate",
        "hydra.utils.instantiate(config)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_such_a_call_would_be_found(source: str) -> None:
    assert dangers(source)


# --- Secrets of the environment stay there


def test_secrets_of_the_environment_are_in_no_file_and_no_output(tmp_path: Path, record_property) -> None:
    steps = ["train.train_steps=2", "logger=wandb", "logger.log_interval=1", "evaluation.num_samples=4"]
    environment = {**SECRETS, "WANDB_MODE": "offline", "HOME": str(tmp_path)}
    good = run_cli("pretrain.py", *TINY, *steps, "run.name=good_run", cwd=tmp_path, **environment)
    assert good.returncode == 0, good.stderr
    (tmp_path / "runs" / "bad_run").mkdir()
    (tmp_path / "runs" / "bad_run" / "samples").touch()  # where a folder is to be
    crash = ["data.record_samples=true", "run.name=bad_run", "parallel=dp2"]
    bad = run_cli("pretrain.py", *TINY, *steps, *crash, cwd=tmp_path, **environment)
    assert bad.returncode == 1
    assert "Traceback" in bad.stderr
    (tmp_path / "output").write_text(good.stdout + good.stderr + bad.stdout + bad.stderr)
    kinds = [Path(file).suffix for file in files_with("good_run", tmp_path)]
    assert {".wandb", ".json", ".yaml"} <= set(kinds)  # the search sees what is there
    for name, secret in SECRETS.items():
        assert files_with(secret, tmp_path) == [], name


# --- Tokenizers are data


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """With settings that name Python code, the code, and pickles under the names that tokenizers have."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    settings = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    (folder / "__init__.py").write_text("from . import evil")
    for name in ("tokenizer.model", "tokenizer.pkl", "vocab.bin"):
        (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
    return folder


def test_code_and_pickles_beside_a_tokenizer_are_not_run(tokenizer_folder: Path, tmp_path: Path) -> None:
    train_tokenizer(["some text"], 300).save(str(tokenizer_folder / "tokenizer.json"))
    assert load_tokenizer(tokenizer_folder).encode("some text").ids
    assert find_tokenizer(tokenizer_folder, None, 300).path == tokenizer_folder / "tokenizer.json"
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_of_code_or_a_pickle_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no tokenizer\.json"):
        load_tokenizer(tokenizer_folder)
    with pytest.raises(ConfigError, match="the tokenizer is Python code, which is not run"):
        find_tokenizer(tokenizer_folder, None, 300)
    (tokenizer_folder / "tokenizer_config.json").unlink()
    assert find_tokenizer(tokenizer_folder, None, 300) is None
    crafted = tokenizer_folder / "tokenizer.model"
    with pytest.raises(ConfigError, match=r"is no tokenizer\.json"):
        load_tokenizer(crafted)
    assert not (tmp_path / "canary").exists()
    pickle.loads(crafted.read_bytes())  # it would have run
    assert (tmp_path / "canary").exists()


# --- Files that claim more than they hold take no memory

HUGE = 2**50
SPARE = 64 * 2**20  # bytes that a reader may take


def refuse_with_little_memory(folder: Path) -> list[str]:
    """In a process of its own: what is said of each crafted file, with no memory for what they claim."""
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE, now + SPARE))
    with pytest.raises(MemoryError):
        np.ones(2 * SPARE, dtype=np.uint8)
    said = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".idx", ".safetensors"):
            with pytest.raises(ConfigError) as error:
                examine(str(path.with_suffix(""))) if path.suffix == ".idx" else read_header(path)
            said.append(str(error.value))
    return said


def crafted_index(prefix: Path, *, sequences: int = 1, boundaries: int = 2, length: int = 2) -> None:
    writer = IndexedWriter(prefix, np.uint16)
    writer.append(np.array([5, 6]), np.array([2]))
    writer.finish()
    index = prefix.with_suffix(".idx")
    magic, version, code, _, _ = HEADER.unpack(index.read_bytes()[: HEADER.size])
    rest = struct.pack("<i", length) + index.read_bytes()[HEADER.size + 4 :]
    index.write_bytes(HEADER.pack(magic, version, code, sequences, boundaries) + rest)


def test_what_claims_more_than_it_holds_is_refused_before_memory_is_taken(tmp_path: Path) -> None:
    crafted_index(tmp_path / "a", sequences=HUGE)
    crafted_index(tmp_path / "b", boundaries=HUGE)
    crafted_index(tmp_path / "c", length=2**31 - 1)
    crafted_index(tmp_path / "d", sequences=2**64 - 1, boundaries=2**64 - 1)
    tensor = {"x": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}
    header = json.dumps(tensor).encode()
    (tmp_path / "e.safetensors").write_bytes(HUGE.to_bytes(8, "little") + header)
    (tmp_path / "f.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    said = run_ranks(refuse_with_little_memory, 1, tmp_path)[0]
    assert len(said) == 6
    for line in said[:4]:
        assert "it is damaged" in line
    assert "its header would not fit" in said[4]
    assert "its tensors take 4,503,599,627,370,496 bytes, the file holds 0" in said[5]


def load_with_little_memory(folder: Path) -> np.ndarray:
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE, now + SPARE))
    return np.array(ArrayCache(folder).get("order", {}, lambda: {"a": np.arange(4)})["a"])


def test_a_cache_that_claims_more_than_it_holds_is_made_anew(tmp_path: Path) -> None:
    ArrayCache(tmp_path).get("order", {}, lambda: {"a": np.arange(3)})
    (array,) = tmp_path.glob("*/a.npy")
    data = array.read_bytes()
    assert b"(3,)" in data
    claim = f"({HUGE},)".encode()
    array.write_bytes(data.replace(b"(3,)" + b" " * (len(claim) - 4), claim))
    shapes = array.with_name("shapes.json")
    shapes.write_text(shapes.read_text().replace("[3,", f"[{HUGE},"))
    assert run_ranks(load_with_little_memory, 1, tmp_path)[0].tolist() == [0, 1, 2, 3]


# --- Names stay names


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "a/../../x", "a/b", "..", ".", "", "~", ".x", "a\nb", "a\\b", "a b", "$(x)", "a\0b"]
)
def test_the_name_of_a_run_is_no_path(name: str) -> None:
    config = compose_config(["data=mock"])
    config.run.name = name
    with pytest.raises(ConfigError, match=r"run\.name=.*letters, digits and any of _ \. = , \+ - only"):
        validate(config, 1)

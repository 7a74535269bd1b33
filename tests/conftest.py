import os

import hypothesis
import pytest

# Before torch is imported anywhere: two cores are shared by up to four ranks.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
# What these tests compare is computed on CPUs; tests/gpu gives its ranks the GPUs back.
GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
pytest_plugins = ["tests.soak"]
hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")

LONGEST = "tests/end_to_end/test_first_run.py"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that the others run beside it."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))

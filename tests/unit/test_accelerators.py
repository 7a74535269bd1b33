"""Optional packages are recognised by what they hold."""

import sys
from pathlib import Path

import pytest

from megatron_moe.config.errors import ConfigError
from megatron_moe.distributed.accelerators import check_apex


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    return tmp_path


@pytest.mark.usefixtures("site")
def test_the_web_toolkit_is_named() -> None:
    with pytest.raises(ConfigError, match="web toolkit of PyPI, not NVIDIA Apex; `pip uninstall apex`"):
        check_apex()


def test_nvidias_apex_is_welcome(site: Path) -> None:
    (site / "apex" / "optimizers").mkdir()
    check_apex()


def test_no_apex_is_fine() -> None:
    check_apex()

"""The README's Python runs as it stands, block after block."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pyro
import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_readme_code_runs(monkeypatch, capsys):
    torch.set_default_dtype(torch.float32)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text("utf-8"), re.M | re.S)
    assert len(blocks) >= 9
    # The bar of the first fit would only fill the log.
    code = "\n".join(blocks).replace("seed=0)", "seed=0, progress_bar=False)", 1)
    names: dict = {"__name__": "readme"}
    exec(compile(code, str(README), "exec"), names)
    assert names["draws"]["eta"].shape == (1000, 8)
    assert names["posterior"]["eta"].shape[0] == 10
    assert names["log_q"].isfinite().all()
    assert names["idata"].posterior["eta"].shape[-1] == 8
    assert names["log_prob"].shape == (5,)
    assert names["energy"].shape == (20,)
    assert names["generated"].shape == (8, 2)
    assert names["ahead"].means.shape == (20, 16, 2, 1)
    assert names["drawn"].shape == (4, 1, 8, 8)
    assert names["density"].shape == (64,)
    assert names["reached"].shape == (8, 2)
    assert set(names["units"]) == {"z1", "z2"}
    assert names["bits"] > 0
    assert not any(row.failure for row in names["table"])
    printed = capsys.readouterr().out
    assert "ELBO" in printed
    assert "The fit looks good" in printed
    pyro.clear_param_store()


def test_readme_has_two_shell_commands():
    assert len(re.findall(r"^```sh$", README.read_text("utf-8"), re.M)) == 2


def test_readme_shows_the_results_of_the_benchmarks(monkeypatch):
    """Otherwise ``python benchmarks/tables.py`` brings it up to date."""
    monkeypatch.syspath_prepend(README.parent / "benchmarks")
    tables = importlib.import_module("tables")
    text = README.read_text("utf-8")
    assert tables.rendered(text) == text
    cut = text.replace("<!-- measured: flows -->", "<!-- measured: nothing -->")
    with pytest.raises(ValueError, match="Places must be those of .*; got .*nothing"):
        tables.rendered(cut)

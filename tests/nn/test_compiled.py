"""Compiled functions: the same values, and what happens where nothing can be compiled."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from flowvi.nn._compiled import Compiled, _inductor, can_compile, compiled, structure


def cube(x: Tensor) -> Tensor:
    return x**3


def refuse(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no compiler\nand more lines")


def test_one_compiled_function_for_every_key():
    first = compiled(cube, "cube", 1)
    assert compiled(cube, "cube", 1) is first
    assert compiled(cube, "cube", 2) is not first
    # torch keeps what it compiled with the code: no other function may count against its limit.
    assert first.function.__code__ is not cube.__code__


def test_structure_is_that_of_the_parameters():
    assert structure(nn.Linear(2, 3)) == structure(nn.Linear(2, 3))
    assert structure(nn.Linear(2, 3)) != structure(nn.Linear(3, 2))
    assert structure(nn.Linear(2, 3)) != structure(nn.Bilinear(2, 2, 3))


def test_nothing_is_compiled_inside_other_transforms():
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(can_compile(x))
        return x

    x = torch.zeros(3)
    look(x)
    torch.func.vmap(look)(x)
    look(x.to("meta"))
    assert seen == [True, False, False]


def test_what_cannot_be_compiled_runs_as_it_is_after_one_warning(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: refuse)
    function = Compiled(cube, "The cube of 2")
    message = "The cube of 2 cannot be compiled and runs as it is: no compiler$"
    with pytest.warns(UserWarning, match=message):
        assert function(torch.tensor(2.0)) == 8
    assert function(torch.tensor(3.0)) == 27


def test_mistakes_of_the_caller_stay_what_they_are(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    function = Compiled(lambda x, y: x @ y, "A product")
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        function(torch.zeros(2), torch.zeros(3))
    assert not function.failed


@pytest.mark.filterwarnings("ignore")  # of torch, about itself, at import
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("lean", [False, True])
def test_lean_functions_recompute_and_run_from_c(lean, bare, monkeypatch):
    from torch._functorch import config as partition

    def compile_fx(graph: object, inputs: object, config_patches: dict) -> tuple:
        return config_patches, partition.ban_recompute_materialized_backward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    options, saves_operands = _inductor(lean, bare, None, [])
    assert options.get("cpp_wrapper", False) is lean
    assert options.get("pattern_matcher", True) is not bare
    assert saves_operands is not lean
    assert partition.ban_recompute_materialized_backward


MISSING = """
import warnings
import torch
from flowvi.nn import MLPField
from flowvi.transforms import RK4, Continuous

flow = Continuous(MLPField(2, (4,), zero_last=False), solver=RK4(1, compiled=True))
x = torch.randn(3, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [flow(x), flow(x)]
expected = Continuous(flow.field, solver=RK4(1))(x)
assert all(torch.allclose(y, expected, rtol=1e-5, atol=1e-6) for y in found)
found[1].sum().backward()
print([str(w.message) for w in caught if "cannot be compiled" in str(w.message)])
"""


@pytest.mark.slow
def test_without_a_compiler_one_warning_says_so(tmp_path):
    environment = {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", MISSING],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("The solve of Continuous(2) cannot be compiled") == 1
    assert "No working C++ compiler found" in done.stdout


IMPORTING = """
import sys
import pyro
before = {name for name in sys.modules if "inductor" in name or "dynamo" in name}
from flowvi.transforms import RK4
RK4(3, compiled=True)
after = {name for name in sys.modules if "inductor" in name or "dynamo" in name}
assert before == after, after - before
print("the same")
"""


@pytest.mark.slow
def test_the_compiler_is_not_imported_unless_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING], capture_output=True, text=True, check=True
    )
    assert done.stdout == "the same\n"

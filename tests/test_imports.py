"""The layout: who may import whom, and that importing changes nothing."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import flowvi

ROOT = Path(flowvi.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Low to high. A part sees lower ones only, not its neighbours in the same row.
LEVELS = (
    ("nn",),
    ("transforms", "paths"),
    ("distributions", "samplers"),
    ("flows", "objectives"),
    ("guides",),
    ("models",),
    ("infer",),
    ("diagnostics", "plots"),
)
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}

# Model and guide reach `infer` as arguments.
FORBIDDEN = {("infer", "guides"), ("infer", "models")}

# The one import that goes upwards, made when a method is called.
DEFERRED_UPWARD = ("infer/result.py", "flowvi.diagnostics")

# Each of these packages is imported in one file.
ONE_PLACE = {
    "arviz": "diagnostics/",
    "matplotlib": "plots/_figure.py",
    "torchdiffeq": "",
    "torchsde": "",
    "zuko": "distributions/adapters.py",
}

CALLED = re.compile(r"""(?:import_module|__import__|find_spec)\(\s*["']([\w.]+)["']""")


@dataclass(frozen=True)
class Import:
    """One imported module.

    Args:
        file: the importing file, relative to the package.
        module: dotted name of what is imported.
        deferred: whether it happens inside a function.
        typing: whether only a type checker sees it.
    """

    file: str
    module: str
    deferred: bool = False
    typing: bool = False

    @property
    def part(self) -> str:
        """The part of the package that imports."""
        return self.file.split("/")[0].removesuffix(".py")


def imports_of(path: Path, source: str | None = None) -> list[Import]:
    source = path.read_text() if source is None else source
    name = path.relative_to(ROOT).as_posix()
    package = ["flowvi", *path.relative_to(ROOT).parent.parts]
    found = [Import(name, m, True) for m in CALLED.findall(source)]

    def visit(node: ast.AST, deferred: bool, typing: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(name, a.name, deferred, typing) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            # `from flowvi import guides` imports a part as well.
            names = [f"{stem}.{a.name}" for a in node.names] if stem == "flowvi" else [stem]
            found.extend(Import(name, m, deferred, typing) for m in names)
        deferred |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing |= isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.iter_child_nodes(node):
            visit(child, deferred, typing)

    visit(ast.parse(source), False, False)
    return found


def violations(found: list[Import]) -> list[str]:
    """What in a list of imports breaks the order."""
    out = []
    for item in found:
        pieces = item.module.split(".")
        if pieces[0] != "flowvi" or item.file == "__init__.py":
            continue
        target = pieces[1] if len(pieces) > 1 else ""
        if target == item.part or target.startswith("__"):
            continue
        if (item.file, ".".join(pieces[:2])) == DEFERRED_UPWARD and item.deferred:
            continue
        # A neighbour may be named in an annotation, which imports nothing.
        least = LEVEL[item.part] + item.typing
        downward = target in LEVEL and LEVEL[target] < least
        if not downward or (item.part, target) in FORBIDDEN:
            out.append(f"{item.file} imports {item.module}")
    return out


def every_import() -> list[Import]:
    return [item for path in FILES for item in imports_of(path)]


def test_every_file_belongs_to_a_known_part():
    parts = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in FILES} - {"__init__"}
    assert parts <= set(LEVEL), parts - set(LEVEL)


def test_imports_go_downwards():
    assert violations(every_import()) == []


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("nn/x.py", "from flowvi.transforms import Planar", True),
        ("transforms/x.py", "from flowvi.nn import MLP", False),
        ("transforms/x.py", "from flowvi.transforms.base import compose", False),
        ("transforms/x.py", "from .base import compose", False),
        ("transforms/x.py", "from ..guides import AutoFlow", True),
        ("transforms/x.py", "from .. import guides", True),
        ("transforms/x.py", "from flowvi import guides", True),
        ("transforms/x.py", "import flowvi.paths", True),
        ("objectives/x.py", "def f():\n    from flowvi import flows", True),
        ("infer/fit.py", "from flowvi.guides import AutoFlow", True),
        ("infer/fit.py", "from flowvi.objectives import ELBO", False),
        ("infer/result.py", "def f():\n    from flowvi.diagnostics import check", False),
        ("infer/result.py", "from flowvi.diagnostics import check", True),
        ("infer/fit.py", "def f():\n    from flowvi.diagnostics import check", True),
        ("plots/fits.py", "from flowvi.diagnostics import Shifts", True),
        ("plots/fits.py", "if TYPE_CHECKING:\n    from flowvi.diagnostics import Shifts", False),
        ("guides/x.py", "if TYPE_CHECKING:\n    from flowvi.infer import Fit", True),
        ("diagnostics/x.py", "import importlib\nimportlib.import_module('flowvi.plots')", True),
    ],
)
def test_the_check_itself(file: str, source: str, wrong: bool):
    assert bool(violations(imports_of(ROOT / file, source))) is wrong


@pytest.mark.parametrize("package", ONE_PLACE)
def test_optional_packages_are_imported_in_one_place(package: str):
    using = {i.file for i in every_import() if i.module.split(".")[0] == package}
    assert len(using) <= 1, using
    assert all(file.startswith(ONE_PLACE[package]) for file in using), using


def test_zuko_is_optional():
    zuko = [i for i in every_import() if i.module.split(".")[0] == "zuko"]
    assert all(i.deferred for i in zuko)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name: the order of isort and ruff."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


PUBLIC = [p for p in FILES if not p.name.startswith("_") or p.name == "__init__.py"]


@pytest.mark.parametrize("path", PUBLIC, ids=module_name)
def test_public_modules_have_a_sorted_all(path: Path):
    module = importlib.import_module(module_name(path))
    if path.name == "__init__.py" and not hasattr(module, "__all__"):
        names = [n for n, v in vars(module).items() if not n.startswith("_")]
        submodules = {p.stem for p in path.parent.iterdir()}
        assert set(names) <= submodules, "a package that exports names needs __all__"
        return
    names = list(module.__all__)
    assert len(set(names)) == len(names)
    assert names in (sorted(names), sorted(names, key=order))
    assert all(hasattr(module, n) for n in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_files_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= 400


SIDE_EFFECTS = """
import importlib, logging, random, warnings
import numpy, torch, pyro
from torch.distributions import Distribution, Transform, biject_to, kl, transform_to

numpy.random.seed(3)

def state():
    return {
        "warning filters": list(warnings.filters),
        "validation": (Distribution._validate_args, "arg_constraints" in vars(Distribution)),
        "arg constraints": repr(vars(Distribution)["arg_constraints"]),
        "transform class": sorted(vars(Transform)),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "print options": repr(torch._tensor_str.PRINT_OPTS),
        "torch rng": torch.get_rng_state().tolist(),
        "python rng": random.getstate(),
        "numpy rng": numpy.random.get_state()[1].tolist(),
        "pyro settings": {k: v for k, v in pyro.settings.get().items()},
        "parameters": list(pyro.get_param_store().keys()),
        "kl": len(kl._KL_REGISTRY),
        "bijections": (len(biject_to._registry), len(transform_to._registry)),
        "logging": (logging.getLogger().level, len(logging.getLogger().handlers)),
    }

before = state()
for module in MODULES:
    importlib.import_module(module)
    after = state()
    changed = [k for k in before if before[k] != after[k]]
    assert not changed, (module, {k: (before[k], after[k]) for k in changed})
try:
    pyro.distributions.Normal(0.0, -1.0)
except ValueError:
    print("clean")
"""


def test_importing_changes_no_global_state():
    code = SIDE_EFFECTS.replace("MODULES", repr([module_name(path) for path in FILES]))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "clean\n", run.stderr

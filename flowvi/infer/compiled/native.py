"""A step compiled to a shared library by AOTInductor, run in a C loop, kept on disk."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, fx

from flowvi.infer.compiled._native_source import SOLVE_SHIM, SOURCE
from flowvi.infer.compiled.backends import Backend, Interpreter, Loop
from flowvi.infer.compiled.hazards import NotCompilable
from flowvi.infer.compiled.step import StepGraph

__all__ = ["Native", "default_cache_folder"]

_FORMAT = 1
_PROXY = b"aoti_torch_proxy_executor_call_function"
_aten = torch.ops.aten


def default_cache_folder() -> Path:
    """Where compiled steps are kept if no folder is given."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flowvi" / "compiled"


class Native(Backend):
    """Compiles a step for this machine and runs it in a C loop, without Python in between.

    A first compile takes tens of seconds; what was compiled once is loaded from ``cache_folder``
    by later processes if the program, shapes, machine and version of torch are the same. Without
    a C++ compiler the steps are run by :class:`Interpreter`, with a warning.

    Args:
        cache_folder: where compiled steps are kept; ``~/.cache/flowvi/compiled`` if left out.
    """

    def __init__(self, cache_folder: str | os.PathLike | None = None) -> None:
        folder = default_cache_folder() if cache_folder is None else cache_folder
        self.cache_folder = Path(folder)

    def prepare(self, step: StepGraph) -> Loop:
        compiler = _compiler()
        if compiler is None:
            note = "No C++ compiler was found, so compiled steps run operation by operation."
            warnings.warn(note + " Install g++ or clang.", stacklevel=2)
            loop = Interpreter().prepare(step)
            loop.note = note
            return loop
        support = self._support(compiler)
        _write_solves_as(step.graph, _solve_operation())
        folder = self.cache_folder / _key(step)
        if not (folder / "model.so").exists():
            try:
                _compile(step, folder, _solve_operation())
            except Exception as error:
                reason = str(error).strip().splitlines()[0]
                raise NotCompilable(
                    f"The compiler behind the step fails with {type(error).__name__}: {reason}. "
                    "Use backend=Interpreter()."
                ) from error
        path = folder / "model.so"
        return _Proxied(path) if _PROXY in path.read_bytes() else _Compiled(path, support)

    def _support(self, compiler: str) -> ctypes.CDLL:
        """The C loop, compiled if this is the first time."""
        name = hashlib.sha256(f"{SOURCE}{torch.__version__}{_machine()}".encode()).hexdigest()
        path = self.cache_folder / f"support-{name[:16]}.so"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
                source = Path(scratch) / "support.c"
                source.write_text(SOURCE)
                built = Path(scratch) / "support.so"
                libraries = Path(torch.__file__).parent / "lib"
                options = ["-O3", "-march=native", "-ffast-math", "-shared", "-fPIC", "-x", "c"]
                link = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu"]
                command = [compiler, *options, str(source), "-o", str(built), *link]
                subprocess.run(command, check=True, capture_output=True)
                os.replace(built, path)
        # Global, because compiled steps look for the solve by name.
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


class _Compiled(Loop):
    """A loaded library; it keeps handles of the last inputs."""

    def __init__(self, path: Path, support: ctypes.CDLL) -> None:
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        create = self._library.AOTInductorModelContainerCreateWithDevice
        create.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_char_p]
        if create(ctypes.byref(self._container), 1, b"cpu", None):
            raise RuntimeError(f"The compiled step at {str(path)!r} does not load.")
        step = self._library.AOTInductorModelContainerRunSingleThreaded
        self._step = ctypes.cast(step, ctypes.c_void_p)
        self._run = support.flowvi_run
        self._run.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t, ctypes.c_void_p]
        self._run.argtypes += [ctypes.c_int64]
        self._free = support.flowvi_free
        self._free.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._inputs: list[Tensor] = []
        self._pointers: list[int] = []
        self._handles = self._scratch = None

    def run(self, inputs: Sequence[Tensor], num_steps: int) -> None:
        if [tensor.data_ptr() for tensor in inputs] != self._pointers:
            self._take(inputs)
        number = len(inputs)
        args = (self._step, self._container, self._handles, number, self._scratch, num_steps)
        error = self._run(*args)
        if error:
            raise RuntimeError(f"The compiled step failed (error {error}).")

    def _take(self, inputs: Sequence[Tensor]) -> None:
        self.close()
        # Kept, so that nothing else comes to lie where they are.
        self._inputs = [tensor.detach() for tensor in inputs]
        self._pointers = [tensor.data_ptr() for tensor in inputs]
        capsules = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(self._inputs)
        array = ctypes.c_void_p * len(capsules)
        self._handles = array(*map(_address, capsules))
        self._scratch = array()

    def close(self) -> None:
        """Let go of the inputs."""
        if self._inputs:
            self._free(self._handles, len(self._inputs))
            self._inputs = []

    def __del__(self) -> None:
        if getattr(self, "_inputs", None):
            self.close()


class _Proxied(Loop):
    """A library some of whose operations go through torch's dispatcher, called step by step."""

    note = "Some operations of the step have no C interface, so the loop over steps is in Python."

    def __init__(self, path: Path) -> None:
        self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)

    @torch.no_grad()
    def run(self, inputs: Sequence[Tensor], num_steps: int) -> None:
        inputs = [tensor.detach() for tensor in inputs]
        for _ in range(num_steps):
            self._runner.run(inputs)


def _address(capsule: object) -> int:
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    return api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))


def _compiler() -> str | None:
    with _quiet():
        from torch._inductor import cpp_builder, exc

    try:
        return cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch's own compiler gives about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@cache
def _solve_operation() -> torch._ops.OpOverload:
    """Triangular solve from the left, with a C interface."""
    name = "flowvi::solve_triangular"
    torch.library.define(name, "(Tensor a, Tensor b, bool upper, bool unitriangular) -> Tensor")

    def solve(a: Tensor, b: Tensor, upper: bool, unitriangular: bool) -> Tensor:
        solved = torch.linalg.solve_triangular(a, b, upper=upper, unitriangular=unitriangular)
        return solved.contiguous()

    torch.library.impl(name, "cpu", solve)
    torch.library.register_fake(name, lambda a, b, upper, unitriangular: b.new_empty(b.shape))
    return torch.ops.flowvi.solve_triangular.default


def _write_solves_as(graph: fx.GraphModule, operation: torch._ops.OpOverload) -> None:
    target = _aten.linalg_solve_triangular.default
    for node in graph.graph.find_nodes(op="call_function", target=target):
        a, b = (n.meta["val"] for n in node.args)
        options = {"left": True, "unitriangular": False, **node.kwargs}
        plain = a.dtype == b.dtype and a.dtype in (torch.float32, torch.float64)
        if not options["left"] or a.shape[:-2] != b.shape[:-2] or not plain:
            continue
        with graph.graph.inserting_before(node):
            args = (*node.args, options["upper"], options["unitriangular"])
            new = graph.graph.call_function(operation, args)
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.graph.erase_node(node)
    graph.recompile()


def _compile(step: StepGraph, folder: Path, solve: torch._ops.OpOverload) -> None:
    with _quiet():
        from torch import _inductor

    for node in step.graph.graph.nodes:
        node.meta.clear()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, torch.no_grad(), _quiet():
        options = {
            "aot_inductor.output_path": str(Path(scratch) / "built" / "model.so"),
            "aot_inductor.custom_ops_to_c_shims": {solve: [SOLVE_SHIM]},
            # Draws that stay in the graph come from torch's generator, as without a compiler.
            "fallback_random": True,
        }
        _inductor.aot_compile(step.graph, tuple(step.inputs), options=options)
        kept = Path(scratch) / "kept"
        kept.mkdir()
        built = Path(scratch) / "built"
        for file in built.glob("model.*"):
            shutil.move(file, kept / file.name)
        # What operations without a C interface are; torch looks for it beside the library.
        for file in built.glob("*.wrapper.json"):
            shutil.move(file, kept / "model.json")
        try:
            os.replace(kept, folder)
        except OSError:
            # Another process was faster.
            if not (folder / "model.so").exists():
                raise


def _key(step: StepGraph) -> str:
    """What a compiled step depends on, as a hash."""
    digest = hashlib.sha256()
    inputs = [(tuple(t.shape), t.stride(), str(t.dtype), str(t.device)) for t in step.inputs]
    facts = (_FORMAT, torch.__version__, torch.get_num_threads(), _machine(), SOURCE, inputs)
    digest.update(repr(facts).encode())
    digest.update(step.graph.code.encode())
    for node in step.graph.graph.find_nodes(op="get_attr"):
        value = getattr(step.graph, node.target)
        if isinstance(value, Tensor):
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        else:
            digest.update(value.code.encode())
    return digest.hexdigest()[:32]


@cache
def _machine() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.platform()} {platform.machine()} {flags}"

"""Steps of SVI as one compiled graph."""

from flowvi.infer.compiled.backends import Backend, Interpreter, Loop
from flowvi.infer.compiled.cuda import CudaGraph
from flowvi.infer.compiled.hazards import NotCompilable
from flowvi.infer.compiled.native import Native
from flowvi.infer.compiled.svi import CompiledSVI

__all__ = [
    "Backend",
    "CompiledSVI",
    "CudaGraph",
    "Interpreter",
    "Loop",
    "Native",
    "NotCompilable",
]

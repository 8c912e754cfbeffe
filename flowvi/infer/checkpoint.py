"""Writing a run to a file and taking it up again, bit for bit."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["get_rng_state", "load_checkpoint", "match_tensors", "save_checkpoint", "set_rng_state"]

FORMAT = 2


def save_checkpoint(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write ``state`` so that the file is at every moment either the old one or the new one."""
    path = Path(path)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(scratch, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def load_checkpoint(path: str | os.PathLike, device: torch.device | None = None) -> dict[str, Any]:
    """Read a checkpoint; nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: if the file is not a checkpoint of this version.
    """
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"`checkpoint` must be a file written by fit; got {str(path)!r}, which does not load."
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"`checkpoint` must be a file written by fit (format {FORMAT}); got {str(path)!r}."
        )
    return state


def match_tensors(what: str, saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    """Check that two sets of named tensors agree in names and shapes.

    Args:
        what: "parameter" or "buffer", for the message.
        saved: tensors of the checkpoint.
        present: tensors of the model and guide at hand.

    Raises:
        ValueError: naming the tensors that differ.
    """
    missing = sorted(set(saved) - set(present))
    unknown = sorted(set(present) - set(saved))
    if missing or unknown:
        raise ValueError(
            f"`checkpoint` must hold the {what}s of this model and guide; it has "
            f"{missing or 'nothing'} that they lack and lacks {unknown or 'nothing'}."
        )
    for name, tensor in saved.items():
        if tensor.shape != present[name].shape:
            raise ValueError(
                f"`checkpoint` must agree in shapes with this model and guide; {what} `{name}` "
                f"has shape {tuple(tensor.shape)} in the file and {tuple(present[name].shape)} "
                "here."
            )


def get_rng_state() -> dict[str, Any]:
    """State of the generators that a Pyro program may use, in plain types."""
    kind, keys, pos, has_gauss, cached = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "random": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), pos, has_gauss, cached),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`get_rng_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    if "cuda" in state:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])

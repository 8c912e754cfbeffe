from __future__ import annotations

import pytest
import torch

from flowvi.nn import _compiled


@pytest.fixture
def pretended(monkeypatch) -> list:
    """Compilation that does nothing; collects what is asked for."""
    asked = []
    monkeypatch.setattr(_compiled, "_FUNCTIONS", {})
    monkeypatch.setattr(torch, "compile", lambda f, **options: asked.append(f) or f)
    return asked

"""Fitting a guide to a model: the target density, the warm start, the fit loop."""

from flowvi.infer.target import Target

__all__ = ["Target"]

"""Flows as variational families for Pyro."""

__version__ = "0.1.0"

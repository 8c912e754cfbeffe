"""Invertible maps with log-determinants, base to target."""

from flowvi.transforms.base import Compose, Direction, FlowTransform, Inverse, compose

__all__ = ["Compose", "Direction", "FlowTransform", "Inverse", "compose"]

"""Image data sets: scikit-learn's digits, MNIST and Frey Faces."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["Images", "digits", "frey_faces", "load_images", "mnist", "static_binarisation"]


@dataclass(frozen=True)
class Images:
    """Whole grey levels of a training, a validation and a test set, ``(N, 1, H, W)``.

    Args:
        train: images to learn from.
        validation: images to choose settings on.
        test: images to report on.
        num_levels: number of grey levels n; levels are 0 to n - 1.
        test_labels: digits of the test set, if it is of digits.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    num_levels: int
    test_labels: Tensor | None = None


def digits() -> Images:
    """Scikit-learn's 8 x 8 digits with 17 grey levels: 1400, 100 and 297 of them."""
    from sklearn.datasets import load_digits

    data = load_digits()
    levels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target[1500:])
    return Images(levels[:1400], levels[1400:1500], levels[1500:], 17, labels)


def mnist(folder: Path) -> Images:
    """MNIST from its idx.gz files: 50,000, 10,000 and 10,000 images, in the order of the files."""
    train, test = (read_idx(folder / f"{name}-images-idx3-ubyte.gz") for name in ("train", "t10k"))
    labels = gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
    return Images(
        train[:50_000],
        train[50_000:],
        test,
        256,
        torch.frombuffer(bytearray(labels), dtype=torch.uint8),
    )


def frey_faces(folder: Path) -> Images:
    """Frey Faces from freyfaces.npz, array ``images`` (1965, 28, 20): 1565, 200 and 200 faces.

    The split is that of van den Berg et al. (2018), Sylvester normalizing flows, arXiv:1803.05649.
    """
    images = np.load(folder / "freyfaces.npz")["images"].copy()
    np.random.RandomState(123).shuffle(images)
    levels = torch.tensor(images, dtype=torch.float32).unsqueeze(1)
    return Images(levels[:1565], levels[1565:1765], levels[1765:], 256)


def load_images(folder: Path | None) -> Images:
    """Frey Faces or MNIST, whichever the folder holds; digits without a folder."""
    if folder is None:
        return digits()
    return frey_faces(folder) if (folder / "freyfaces.npz").exists() else mnist(folder)


def static_binarisation(images: Images) -> Images:
    """Black and white images drawn once, with a fixed seed, in the order of the sets."""
    generator = np.random.default_rng(0)
    parts = [
        torch.from_numpy(
            generator.random(part.shape) < part.double().numpy() / (images.num_levels - 1)
        ).float()
        for part in (images.train, images.validation, images.test)
    ]
    return Images(*parts, 2)


def read_idx(path: Path) -> Tensor:
    """Images ``(N, 1, height, width)`` of an idx.gz file, levels 0 to 255."""
    raw = gzip.decompress(path.read_bytes())
    count, height, width = (int.from_bytes(raw[i : i + 4], "big") for i in (4, 8, 12))
    pixels = torch.frombuffer(bytearray(raw[16:]), dtype=torch.uint8)
    return pixels.reshape(count, 1, height, width).float()

from setuptools import find_packages, setup

EXTRAS = {
    "examples": ["matplotlib>=3.7", "scikit-learn>=1.3"],
    "benchmarks": ["zuko>=1.3", "nflows>=0.14", "normflows>=1.7", "scikit-learn>=1.3"],
    "test": [
        "matplotlib>=3.7",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "scikit-learn>=1.3",
        "zuko>=1.3",
    ],
}

setup(
    name="flowvi",
    version="0.1.0",
    description="Flows as variational families for Pyro.",
    packages=find_packages(include=["flowvi", "flowvi.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.4",
        "pyro-ppl>=1.9.1",
        "torchdiffeq>=0.2.4",
        "torchsde>=0.2.6",
        "arviz>=0.17",
        "numpy>=1.24",
    ],
    extras_require=EXTRAS,
)

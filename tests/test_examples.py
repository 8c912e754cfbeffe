"""Every example runs in its smoke-test setting and says where its results are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = {
    "cnf_density": ["cnf_density.py"],
    "cnf_posteriors": ["cnf_posteriors.py"],
    "f_vae": ["f_vae.py"],
    "vae": ["vae.py"],
    "diffusion": ["diffusion.py"],
    "latent_sde": ["latent_sde.py"],
    "compare": [
        *("compare.py", "--problems", "eight_schools", "--workers", "1"),
        *("--guides", "mean-field", "RealNVP", "--objectives", "ELBO", "STL", "CUBO"),
    ],
    "posteriors": [
        *("posteriors.py", "--problems", "eight_schools", "--workers", "1"),
        *("--guides", "AutoNormal", "RealNVP", "mixture"),
    ],
    "rectified_flow": ["rectified_flow.py"],
    "sde_posteriors": ["sde_posteriors.py"],
}
# What each prints in its table.
PRINTED = {
    "cnf_density": "integral",
    "cnf_posteriors": "Pareto k",
    "compare": "Pareto k",
    "f_vae": "weighted",
    "vae": "information",
    "diffusion": "reconstruction",
    "latent_sde": "path KL",
    "posteriors": "Pareto k",
    "rectified_flow": "straightness",
    "sde_posteriors": "weighted",
}


def test_every_script_is_listed():
    scripts = {p.name for p in EXAMPLES.glob("*.py") if "argparse" in p.read_text("utf-8")}
    assert scripts == {command[0] for command in SCRIPTS.values()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name, tmp_path):
    script, *options = SCRIPTS[name]
    command = [sys.executable, str(EXAMPLES / script), "--smoke-test", *options]
    done = subprocess.run(
        [*command, "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "MPLBACKEND": "Agg"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("*.png")), done.stdout
    assert PRINTED[name] in done.stdout

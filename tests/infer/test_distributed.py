from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from flowvi.infer import DistributedSVI, GlobalOptim, Spread, fit
from flowvi.objectives import ELBO

PROGRAM = Path(__file__).parent / "distributed_program.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two processes have written down."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(PROGRAM), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_two_processes_equal_one(results):
    expected = runpy.run_path(str(PROGRAM))["whole"]()
    for result in results:
        got = result["split"]
        torch.testing.assert_close(
            torch.tensor(got["losses"]), torch.tensor(expected["losses"]), rtol=0, atol=1e-6
        )
        assert got["params"].keys() == expected["params"].keys()
        for name, value in expected["params"].items():
            torch.testing.assert_close(got["params"][name], value, rtol=0, atol=1e-6)


def test_local_latents_have_draws_of_their_own(results):
    first, second = (result["local"] for result in results)
    assert first["params"].keys() == second["params"].keys() == {"m", "loc"}
    for name, value in first["params"].items():
        assert torch.equal(value, second["params"][name])
    assert torch.equal(first["mean"], second["mean"])
    for a, b in zip(first["index"], second["index"], strict=True):
        assert not set(a.tolist()) & set(b.tolist())
    # Standardised, so that two equal streams would give equal numbers.
    noise = [(r["z"] - r["z"].mean()).flatten() for r in (first, second)]
    assert not torch.isclose(*noise).any()


def test_particles_are_spread(results):
    first, second = (result["particles"] for result in results)
    for name, value in first["params"].items():
        assert torch.equal(value, second["params"][name])
    assert torch.equal(first["index"], second["index"])
    assert not torch.isclose(first["w"], second["w"]).any()


def test_step_that_fails_in_one_process_is_skipped_by_all(results):
    first, second = (result["one_fails"] for result in results)
    for result in (first, second):
        assert result["skipped"] == 1
        bad = torch.tensor(result["losses"]).isfinite().logical_not()
        assert bad.nonzero().flatten().tolist() == [2]
    for name, value in first["params"].items():
        assert torch.equal(value, second["params"][name])
    assert first["warnings"] == []
    assert second["warnings"] == ["Process 1 skips a step: no such number"]


def test_fit_resumes_bit_equal_on_all_processes(results):
    first, second = (result["fitted"] for result in results)
    for result in (first, second):
        assert result["written"]
        assert len(result["whole"]) == 30
        assert torch.equal(result["whole"], result["resumed"])
        assert result["elbo"][0] == result["elbo"][1]
    assert torch.equal(first["whole"], second["whole"])
    assert first["elbo"] == second["elbo"]


def test_messages(results):
    expected = [
        "ValueError: `subsample_size` of plate `data`, for one process, times the number of "
        "processes must be at most its size, 64; got 40 * 2.",
        "NotImplementedError: IWAE combines the weights of all particles, so they cannot be "
        "spread over processes. Use Spread.MINIBATCH, or ELBO or STL.",
        "TypeError: `spread` must be a Spread; got 'particles'.",
    ]
    for rank, result in enumerate(results):
        *others, last = result["messages"]
        assert others == expected
        assert last == (
            "RuntimeError: All processes must have the same parameters and buffers; those of "
            f"process {1 - rank} differ from those of process {rank} in ['l']."
        )


def test_one_process_alone_is_told_how_to_start():
    def model():
        """No sites are needed to be refused."""

    with pytest.raises(RuntimeError, match="Start the program with torchrun"):
        DistributedSVI(model, AutoNormal(model), GlobalOptim(), ELBO())
    with pytest.raises(ValueError, match="`max_seconds` must be None with `spread`"):
        fit(model, AutoNormal(model), spread=Spread.MINIBATCH, max_seconds=1.0)

from __future__ import annotations

import runpy
import subprocess
import sys
import textwrap

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from flowvi.guides import AutoFlow
from flowvi.infer import fit
from flowvi.infer.checkpoint import save_checkpoint

Y = torch.tensor([1.2, -0.3, 0.8], dtype=torch.float64)


def model(y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.StudentT(3.0, z[..., 0] + z[..., 1].exp(), 0.5), obs=y)


class Killed(Exception):
    pass


def kill_at(step):
    def callback(now, loss):
        if now == step:
            raise Killed

    return callback


@pytest.mark.parametrize(("make", "step"), [(AutoFlow, 17), (AutoNormal, 20), (AutoNormal, 33)])
def test_resumed_run_is_bit_equal(make, step, tmp_path):
    options = {"num_steps": 40, "seed": 1, "progress_bar": False, "start": make is AutoFlow}
    options |= {"checkpoint_every": 10, "num_particles": 8}
    whole = fit(model, make(model), Y, **options)
    path = tmp_path / "run.pt"
    with pytest.raises(Killed):
        fit(model, make(model), Y, checkpoint=path, callback=kill_at(step), **options)
    # Another seed on purpose: everything random comes from the file.
    resumed = fit(model, make(model), Y, checkpoint=path, **{**options, "seed": 99})
    assert torch.equal(whole.losses, resumed.losses)
    assert whole.elbo == resumed.elbo
    assert whole.averaged == resumed.averaged


def test_killed_process_resumes_bit_equal(tmp_path, monkeypatch, capsys):
    script = tmp_path / "run.py"
    script.write_text(
        textwrap.dedent("""
        import os, sys, torch, pyro
        import pyro.distributions as dist
        from flowvi.guides import AutoFlow
        from flowvi.infer import fit
        torch.set_default_dtype(torch.float64)
        path, kill = sys.argv[1], int(sys.argv[2])
        def model(y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z.abs(), 0.5), obs=y)
        def callback(step, loss):
            if step == kill:
                os._exit(9)
        result = fit(model, AutoFlow(model), torch.tensor(1.0), seed=0, num_steps=45,
                     num_particles=8, tolerance=None, start=False,
                     checkpoint=path or None, checkpoint_every=10, callback=callback,
                     progress_bar=False)
        print([v.hex() for v in result.losses.tolist()])
        """)
    )

    def alone(kill):
        command = [sys.executable, str(script), str(tmp_path / "a.pt"), str(kill)]
        return subprocess.run(command, capture_output=True, text=True)

    killed, resumed = alone(27), alone(-1)
    assert killed.returncode == 9, killed.stderr
    assert resumed.returncode == 0, resumed.stderr
    monkeypatch.setattr(sys, "argv", [str(script), "", "-1"])
    runpy.run_path(str(script))
    whole = capsys.readouterr().out
    assert whole.count("0x") == 45
    assert whole == resumed.stdout


def test_other_guide_or_length_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    options = {
        "num_steps": 4,
        "seed": 1,
        "progress_bar": False,
        "checkpoint": path,
        "start": False,
    }
    fit(model, AutoMultivariateNormal(model), Y, **options)
    with pytest.raises(ValueError, match=r"parameters of this model and guide; it has \['AutoMul"):
        fit(model, AutoNormal(model), Y, **options)
    with pytest.raises(ValueError, match="`num_steps` must be that of the checkpoint, 4; got 5"):
        fit(model, AutoMultivariateNormal(model), Y, **{**options, "num_steps": 5})

    def wider(y):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"shape \(2,\) in the file and \(3,\) here"):
        fit(wider, AutoMultivariateNormal(wider), Y, **options)


def test_foreign_file_is_refused(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="`checkpoint` must be a file written by fit"):
        fit(model, AutoNormal(model), Y, checkpoint=path, progress_bar=False)
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="which does not load"):
        fit(model, AutoNormal(model), Y, checkpoint=path, progress_bar=False)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"step": 1})
    old = path.read_bytes()
    with pytest.raises((AttributeError, TypeError, RuntimeError)):
        save_checkpoint(path, {"step": (i for i in range(3))})
    assert path.read_bytes() == old


def test_finished_run_is_not_run_again(tmp_path):
    options = {"num_steps": 4, "seed": 1, "progress_bar": False, "start": False}
    options["checkpoint"] = tmp_path / "r.pt"
    first = fit(model, AutoNormal(model), Y, **options)
    again = fit(model, AutoNormal(model), Y, **options, callback=kill_at(0))
    assert torch.equal(first.losses, again.losses)

"""Numbers of steps: drawn in training only, seeded, replayed, equal on all ranks."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_block
from torch import nn

from revdeq_hf import ReversibleFixedPoint
from revdeq_hf.steps_revdeq import check_steps, check_steps_sampling, draw_steps

UNIFORM = {"distribution": "uniform", "min_steps": 2, "max_steps": 5}


def draws(sampling, count=3000):
    check_steps_sampling(sampling)
    return torch.tensor([draw_steps(sampling) for _ in range(count)], dtype=torch.float64)


def test_the_distributions_are_what_they_say():
    found = Counter(draws(UNIFORM).tolist())
    assert set(found) == {2, 3, 4, 5}
    assert all(abs(n / 3000 - 1 / 4) < 0.04 for n in found.values())
    found = Counter(draws({"distribution": "choice", "steps": [2, 16], "weights": [1, 3]}).tolist())
    assert set(found) == {2, 16}
    assert abs(found[16] / 3000 - 3 / 4) < 0.04
    poisson = draws({"distribution": "poisson", "mean": 6})
    assert abs(poisson.mean() - 6) < 0.2
    assert abs(poisson.var() - 5) < 0.6
    assert poisson.min() >= 1
    tailed = draws({"distribution": "lognormal_poisson", "mean": 6, "sigma": 0.5})
    assert abs(tailed.mean() - 6) < 0.4
    assert tailed.var() > poisson.var() * 1.5, "a log-normal rate has a longer tail"
    bounded = draws({"distribution": "lognormal_poisson", "mean": 6, "min_steps": 4, "max_steps": 7})
    assert (bounded.min(), bounded.max()) == (4, 7)


def test_steps_are_drawn_in_training_with_gradients_only_and_by_the_users_seed():
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, max_steps=7, steps_sampling=UNIFORM)

    def series():
        torch.manual_seed(3)
        return [layer(x).steps[0].item() for _ in range(20)]

    first = series()
    assert set(first) <= {2, 3, 4, 5}
    assert len(set(first)) > 1
    assert series() == first
    assert layer(x, max_steps=9).steps.tolist() == [9] * 3
    with torch.no_grad():
        assert layer(x).steps.tolist() == [7] * 3
    layer.eval()
    state = torch.get_rng_state()
    assert layer(x).steps.tolist() == [7] * 3
    assert torch.equal(torch.get_rng_state(), state), "what is not drawn must not move the generator"


def test_a_draw_is_replayed_by_an_outer_checkpoint():
    block, x = make_block("attention")
    layer = ReversibleFixedPoint(block, steps_sampling={"distribution": "uniform", "min_steps": 1, "max_steps": 12})
    for seed in range(6):
        torch.manual_seed(seed)
        plain = torch.autograd.grad(layer(x).z.square().sum(), x)[0]
        torch.manual_seed(seed)
        wrapped = torch.utils.checkpoint.checkpoint(lambda t: layer(t).z.square().sum(), x, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(wrapped, x)[0], plain)


@pytest.mark.skipif(sys.platform == "win32", reason="gloo ranks are started by torchrun on Linux and macOS")
def test_ranks_draw_the_same_though_their_generators_differ():
    code = (
        "import os, torch, torch.distributed as dist; from revdeq_hf.steps_revdeq import draw_steps; dist.init_process_group('gloo');"
        "torch.manual_seed(dist.get_rank());"
        "s = {'distribution': 'uniform', 'min_steps': 1, 'max_steps': 1000};"
        "print('DRAWS ' + str([draw_steps(s) for _ in range(5)]), flush=True); dist.barrier(); os._exit(0)"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--no-python",
        sys.executable,
        "-c",
        code,
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False, cwd=Path(__file__).parent)
    found = re.findall(r"DRAWS (\[.*?\])", done.stdout)  # the two may share a line
    assert len(found) == 2, done.stderr[-2000:]
    assert len(set(found)) == 1


@pytest.mark.parametrize("number", [4, np.int64(4), np.uint8(4), torch.tensor(4), torch.tensor([4], dtype=torch.int32)], ids=repr)
def test_a_whole_number_of_any_library_is_one(number):
    assert type(check_steps(number)) is int
    assert check_steps(number) == 4
    block, x = make_block("attention")
    assert ReversibleFixedPoint(block)(x, max_steps=number).steps.tolist() == [4] * 3


@pytest.mark.parametrize(
    "number",
    [True, np.True_, torch.tensor(True), 4.0, np.float64(4), torch.tensor(4.0), torch.tensor([4, 5]), "4", None, np.int64(0)],
    ids=repr,
)
def test_what_is_no_whole_number_of_steps_is_refused(number):
    with pytest.raises(ValueError, match="max_steps must be a whole number from 1 to 100000, got "):
        check_steps(number)


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("uniform", "must be None or a dict"),
        ({"distribution": "normal"}, "'uniform', 'poisson'"),
        ({"distribution": "uniform", "min_steps": 2}, "needs 'min_steps' and 'max_steps'"),
        ({"distribution": "uniform", "min_steps": 5, "max_steps": 2}, "got 5 and 2"),
        ({"distribution": "uniform", "min_steps": 0, "max_steps": 2}, "'min_steps' must be a whole number"),
        ({"distribution": "uniform", "min_steps": 1, "max_steps": 2, "mean": 3}, r"got \['mean'\]"),
        ({"distribution": "poisson"}, "'mean' must be a number from 1"),
        ({"distribution": "poisson", "mean": 0.5}, "got 0.5"),
        ({"distribution": "lognormal_poisson", "mean": 4, "sigma": -1}, "'sigma'"),
        ({"distribution": "choice", "steps": []}, "must be a list"),
        ({"distribution": "choice", "steps": [2, 0]}, "got 0"),
        ({"distribution": "choice", "steps": [2, np.int64(3)]}, "must be a whole number"),  # a config's JSON could not hold it
        ({"distribution": "choice", "steps": [2, 3], "weights": [1]}, "'weights'"),
        ({"distribution": "choice", "steps": [2, 3], "weights": [0, 0]}, "'weights'"),
    ],
    ids=str,
)
def test_unusable_distributions_are_refused(sampling, message):
    with pytest.raises(ValueError, match=message):
        ReversibleFixedPoint(nn.Linear(2, 2), steps_sampling=sampling)

"""The examples run, and learn."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

DIGITS = Path(__file__).parents[1] / "examples" / "digits"
TOY = Path(__file__).parents[1] / "examples" / "gradnorm_toy"
CODE = """
import sys
from pathlib import Path
from main import run
metrics = run(seeds=1, epochs=8, out=Path(sys.argv[1]), progress=False)
print([metrics[method]["left"][0] for method in ("single-task", "Sum", "PCGrad")])
"""
COMBINATIONS = """
import torch
from data import Digits, split_digits
from mtlfast import methods, weightings
from tasks import TASKS
from train import train

torch.set_num_threads(1)
digits = tuple(Digits(d.images[:200], d.classes[:200]) for d in split_digits(0, torch.device("cpu")))
aggregators, losses = methods(4), weightings(4)
pairs = [(name, None) for name in aggregators] + [("PCGrad", name) for name in losses]
for one, other in pairs:
    made = None if other is None else losses[other]()
    run = train(TASKS, aggregators[one](), digits, 0, 2, lambda: None, made)
    assert all(map(torch.isfinite, run.losses[-1])), (one, other)
print(len(pairs))
"""


@pytest.mark.skipif(not DIGITS.exists(), reason="needs the checkout")
def test_digits_learn_with_every_method(tmp_path):
    pytest.importorskip("sklearn")
    picture = tmp_path / "digits.png"

    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", CODE, str(picture)], cwd=DIGITS, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    accuracies = json.loads(run.stdout)
    assert min(accuracies) > 50  # a guess is right in 10 %
    assert picture.stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.skipif(not DIGITS.exists(), reason="needs the checkout")
def test_digits_take_any_aggregator_and_weighting_by_name():
    pytest.importorskip("sklearn")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMBINATIONS], cwd=DIGITS, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 45


@pytest.mark.skipif(not DIGITS.exists(), reason="needs the checkout")
def test_digits_refuse_a_name_that_is_none():
    pytest.importorskip("sklearn")
    code = "from experiment import experiment; experiment('PCGrad', 'Equal', None, 1, 1, 'cpu', False)"
    run = subprocess.run([sys.executable, "-c", code], cwd=DIGITS, capture_output=True, text=True)
    assert "ValueError: 'Equal' is none of Sum, Mean, Constant," in run.stderr


TOY_CODE = """
import sys
from pathlib import Path
from main import final, run
runs = run(steps=150, out=Path(sys.argv[1]))
print([(final(run).max() / final(run).min()).item() for run in runs.values()])
"""


@pytest.mark.skipif(not TOY.exists(), reason="needs the checkout")
def test_gradnorm_brings_the_rates_of_its_toy_problem_together(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "toy.png"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", TOY_CODE, str(picture)], cwd=TOY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    equal, gradnorm = json.loads(run.stdout)
    assert gradnorm < equal / 1.3
    assert picture.stat().st_size > 10_000


@pytest.mark.long
@pytest.mark.skipif(not DIGITS.exists(), reason="needs the checkout")
def test_digits_run_the_method_once_more_in_groups(tmp_path):
    pytest.importorskip("sklearn")
    code = CODE.replace("epochs=8", "epochs=1, groups='tensor'").replace('"PCGrad")', '"PCGrad", "by tensor")')
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(tmp_path / "digits.png")],
        cwd=DIGITS,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout)) == 4


PREFERENCES = Path(__file__).parents[1] / "examples" / "preferences"
PREFERENCES_CODE = """
import sys
from pathlib import Path
from main import run, timings, trade_off
from model import Config
outcome = run(seeds=1, steps=60, rounds=2, config=Config(64, 512, 2), out=Path(sys.argv[1]))
trade_off(outcome.runs), timings(outcome.times)
print([[of_seeds[0].plan, of_seeds[0].accuracies[-1].tolist()] for of_seeds in outcome.runs.values()])
"""
SAME_GRADIENTS = """
import torch
from data import losses, mixing
from model import Config, Scorer
from train import pairs_of
import mtlfast
from mtlfast.aggregation import UPGrad

pairs = pairs_of(0)[0].at(torch.arange(32))
assert (pairs.preferred == 0).any()  # a tie
model = Scorer(Config(16, 32, 2)).double()

def gradients(*args, **kwargs):
    model.zero_grad()
    plan = mtlfast.backward(*args, UPGrad(), shared=model, **kwargs).plan.way
    return plan, [parameter.grad.clone() for parameter in model.parameters()]

margins = model(pairs.tokens)
plan, mixed = gradients(margins, mixing=mixing(margins, pairs.preferred), jacobian="mixing")
other, plain = gradients(list(losses(model(pairs.tokens), pairs.preferred)))
assert (plan, other) == ("mixing", "stored")
for one, two in zip(mixed, plain, strict=True):
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-10)
"""


@pytest.mark.skipif(not PREFERENCES.exists(), reason="needs the checkout")
def test_preferences_are_learned_in_one_pass(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "preferences.png"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PREFERENCES_CODE, str(picture)],
        cwd=PREFERENCES,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    methods = json.loads(run.stdout.replace("'", '"'))
    assert len(methods) == 3
    for plan, accuracies in methods:
        assert plan == "mixing"
        assert sum(accuracies) / 3 > 55  # a guess is right in 50 %
    assert picture.stat().st_size > 10_000


@pytest.mark.skipif(not PREFERENCES.exists(), reason="needs the checkout")
def test_mixed_margins_have_the_gradients_of_the_rewards_losses():
    run = subprocess.run([sys.executable, "-c", SAME_GRADIENTS], cwd=PREFERENCES, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


DISTRIBUTED = Path(__file__).parents[1] / "examples" / "distributed" / "train.py"


@pytest.mark.long
@pytest.mark.skipif(not DISTRIBUTED.exists(), reason="needs the checkout")
@pytest.mark.parametrize("way", ["--ddp", "--fsdp2"])
def test_two_processes_train_the_weights_of_one(way):
    pytest.importorskip("sklearn")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run([*torchrun, str(DISTRIBUTED), way, "--epochs", "1"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    figures = re.findall(r"Largest difference of a weight \(float64\): (\S+)", run.stdout)
    assert len(figures) == 1  # rank 0 alone tells
    assert float(figures[0]) < 1e-9

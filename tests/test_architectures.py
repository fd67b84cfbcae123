"""The architectures of examples/architectures say truly which tasks share what, and they learn."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "architectures"
pytestmark = pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the checkout")

NETWORKS = """
from itertools import compress
import torch
import mtlfast
from architectures import ARCHITECTURES, MMoE, CGC, PLE, PartialSharing
from mtlfast.aggregation import PCGrad, Sum

def networks(tasks):
    torch.manual_seed(0)  # with which the second and third task of asymmetric sharing conflict
    made = {name: make(5, [2] * tasks, 4) for name, make in ARCHITECTURES.items()}
    made["2 of 3 layers"] = PartialSharing(5, [2] * tasks, 4, layers=3, shared_layers=2)
    made["all layers"] = PartialSharing(5, [2] * tasks, 4, layers=2, shared_layers=2)
    made["one expert"] = MMoE(5, [2] * tasks, 4, experts=1)
    made["CGC of 3"] = CGC(5, [2] * tasks, 4, experts=3)
    made["one level"] = PLE(5, [2] * tasks, 4, levels=1)
    made["three levels"] = PLE(5, [2] * tasks, 4, experts=2, levels=3)
    return {name: network.double() for name, network in made.items()}

def losses(network):
    torch.manual_seed(0)
    return [(output - k).square().mean() for k, output in enumerate(network(torch.randn(16, 5).double()))]
"""
TRUTH = """
for tasks in (1, 2, 3, 4):
    for name, network in networks(tasks).items():
        names, parameters = zip(*network.named_parameters())
        reached = [[] for _ in names]
        for k, loss in enumerate(losses(network)):
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for of_parameter, gradient in zip(reached, gradients):
                of_parameter += [] if gradient is None else [k]
        for parameter, of_parameter in zip(names, reached):
            (said,) = [said for module, said in network.sharing().items() if parameter.startswith(module + ".")]
            assert said == tuple(of_parameter), (name, tasks, parameter, said, of_parameter)
"""
ARGUMENTS = """
def gradients(network, aggregator, **arguments):
    network.zero_grad()
    torch.manual_seed(1)
    result = mtlfast.backward(losses(network), aggregator, **arguments)
    return result, [parameter.grad.clone() for parameter in network.parameters()]

for name, network in networks(3).items():
    sum(losses(network)).backward()
    plain = [parameter.grad.clone() for parameter in network.parameters()]
    _, summed = gradients(network, Sum(), shared=network.shared())
    torch.testing.assert_close(summed, plain)
    _, given = gradients(network, PCGrad(), shared=network.shared())
    _, found = gradients(network, PCGrad())  # the graph tells what more than one task reaches
    torch.testing.assert_close(given, found)
    result, grouped = gradients(network, PCGrad(), shared=network.shared(), groups=network.groups())
    if name == "asymmetric sharing":
        assert list(result.by_group) == ["tasks 0, 1, 2", "tasks 1, 2"]
        weights = result.by_group["tasks 1, 2"].weights
        assert weights[0] == 0
        assert (weights[1:] > 1).all()  # the two conflict
        places = [n.startswith("bottoms.1.") for n, _ in network.named_parameters()]
        network.zero_grad()
        mtlfast.backward(losses(network)[1:], PCGrad(), shared=network.bottoms[1])
        expected = [parameter.grad for parameter in network.bottoms[1].parameters()]
        torch.testing.assert_close(list(compress(grouped, places)), expected)
    else:
        assert list(result.by_group) == ["tasks 0, 1, 2"]
        torch.testing.assert_close(grouped, given)
"""
SIZES = """
from architectures import ARCHITECTURES, width_of

for parameters in (5_000, 100_000):
    for name, make in ARCHITECTURES.items():
        width = width_of(make, 32, [10, 1], parameters)
        size, more = (sum(p.numel() for p in make(32, [10, 1], w).parameters()) for w in (width, width + 1))
        assert size <= parameters < more, (name, width, size, more)
"""
LABELS = """
import torch
from synthetic import NOISE, regression, synthetic

for correlation in (-1.0, 0.0, 0.3, 1.0):
    labels = regression(correlation, torch.Generator().manual_seed(0))
    products = labels.weights @ labels.weights.T
    torch.testing.assert_close(products, torch.tensor([[1, correlation], [correlation, 1]]), atol=1e-5, rtol=0)
alike = synthetic(1.0, 0).test.targets.diff(dim=1).std()
assert abs(alike - NOISE * 2**0.5) < 0.01, alike
one, other = synthetic(0.3, 0), synthetic(0.3, 0)
assert torch.equal(next(one.batches(1)).targets, next(other.batches(1)).targets)
assert not torch.equal(next(one.batches(1)).targets, next(one.batches(2)).targets)
"""
LEARN = """
import json
import torch
from architectures import ARCHITECTURES
from canvases import canvases
from synthetic import synthetic
from train import train
from mtlfast.aggregation import PCGrad

torch.set_num_threads(1)
reading = {name: train(make, canvases(0), [0, 1, 3], PCGrad(), 0, 30) for name, make in ARCHITECTURES.items()}
labels = {name: train(make, synthetic(0.5, 0), [0, 1], PCGrad(), 0, 30) for name, make in ARCHITECTURES.items()}
grouped = train(ARCHITECTURES["asymmetric sharing"], canvases(0), [0, 1, 3], PCGrad(), 0, 10, grouped=True)
together = train(ARCHITECTURES["asymmetric sharing"], canvases(0), [0, 1, 3], PCGrad(), 0, 10)
print(json.dumps([reading, labels, grouped, together]))
"""
EXPERIMENT = """
import json
import sys
from pathlib import Path
from architectures import ARCHITECTURES
for name in list(ARCHITECTURES)[2:]:  # two are enough
    del ARCHITECTURES[name]
from experiment import ROWS, SINGLE, Outcome, experiment
from figure import save
from run import table
from tasks import TASKS

outcomes = experiment([0.5], seeds=1, steps=2, grouped=False, processes=2, progress=False)
save(outcomes, Path(sys.argv[1]))
for correlation, outcome in outcomes.items():
    table(correlation, outcome)
    assert all(len(outcome.metrics[row]) == 1 and len(outcome.metrics[row][0]) == len(outcome.tasks) for row in ROWS)
made = Outcome(TASKS[1:3], {SINGLE: [[80.0, 10.0]], ROWS[1]: [[88.0, 12.0]]})  # the first: higher is better
print(json.dumps([list(outcomes), made.delta_m(ROWS[1])]))
"""


def run(code, *arguments):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], cwd=EXAMPLE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", [TRUTH, ARGUMENTS], ids=["truth", "arguments"])
def test_what_is_said_to_be_shared_is_shared(code):
    run(NETWORKS + code)


def test_all_architectures_are_of_one_size():
    run(SIZES)


def test_synthetic_labels_are_as_correlated_as_asked():
    pytest.importorskip("sklearn")
    run(LABELS)


def test_every_architecture_learns():
    pytest.importorskip("sklearn")
    reading, labels, grouped, together = json.loads(run(LEARN))
    for left, right, _ in reading.values():
        assert min(left, right) > 40  # a guess is right in 10 %
    for errors in labels.values():
        assert max(errors) < 60  # the label's mean has an error of 100 %
    assert grouped != together


@pytest.mark.long
def test_the_experiment_fills_its_tables(tmp_path):
    for module in ("sklearn", "matplotlib", "rich", "tqdm", "typer"):
        pytest.importorskip(module)
    picture = tmp_path / "architectures.png"
    workloads, (delta,) = json.loads(run(EXPERIMENT, str(picture)))
    assert workloads == [0.5, None]
    assert delta == pytest.approx((10 - 20) / 2)
    assert picture.stat().st_size > 10_000

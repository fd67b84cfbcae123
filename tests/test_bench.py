"""The benchmark's own code: the peers that it times are the real ones, and its sections run."""

import random

import pytest
import torch
from torch import nn

from mtlfast import TaskGradients, aggregation
from mtlfast.aggregation import Aggregator
from mtlfast.bench import baselines, contests, faces, memory_speed, peak_memory, peers, run, sizes
from mtlfast.bench.section import Section
from mtlfast.compat.pcgrad import PCGrad


def test_the_plain_way_is_what_the_face_does():
    torch.manual_seed(0)
    rows = [[torch.randn(4, 3), torch.randn(5)] for _ in range(4)]
    parameters = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(5))]
    random.seed(1)
    faces.plain_surgery(rows, parameters)
    wanted = [p.grad.clone() for p in parameters]
    random.seed(1)
    PCGrad(torch.optim.SGD(parameters, lr=0.1)).surgery(rows, parameters, parameters)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_the_plain_way_by_tensor_is_what_groups_do():
    torch.manual_seed(0)
    row = [torch.randn(4, 3), torch.randn(5), torch.randn(7)]
    other = [factor * g + 0.1 * torch.randn_like(g) for factor, g in zip((1, -1, -2), row, strict=True)]
    grads = TaskGradients.from_rows([row, other])
    wanted = baselines.plain_pcgrad_by_tensor(grads)()  # of two tasks there is one order
    by_tensor, at_once = Aggregator.targets(grads), Aggregator.targets(grads)
    contests.direction(aggregation.PCGrad(), grads, by_tensor, by_tensor=True)()
    contests.direction(aggregation.PCGrad(), grads, at_once)()
    for one, plain, together in zip(by_tensor, wanted, at_once, strict=True):
        assert torch.allclose(one, plain, atol=1e-5)
        assert not torch.allclose(together, plain, atol=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_faces_are_measured():
    section = faces.measure(elements=20_000, rounds=1)
    assert len(section.rows) == 2 * (2 + 4 * peers.installed())
    assert all(len(row["times faster"]) == 3 for row in section.rows)
    assert {row["K"] for row in section.rows} == {4, 8}


@pytest.fixture(scope="module")
def sections() -> list[Section]:
    """Tables of the benchmark with numbers as wide as those of large gradients."""
    measured = [
        memory_speed.measure(elements=20_000, rounds=1, quick=True),
        *sizes.measure(rounds=1, largest=200_000),
        Section("compiled", "A row that failed", "[a] no markup", [{"K": 2, "ms": 1.0}, {"K": 4, "compiled": "no"}]),
        peak_memory.measure(elements=20_000),
    ]
    if peers.installed():
        measured += [peers.measure(elements=20_000, rounds=1, quick=False)]
    for section in measured:
        section.rows = [{column: _wide(value) for column, value in row.items()} for row in section.rows]
    return measured


def _wide(value: object) -> object:
    return [123.0, 1234.0, 12345.0] if isinstance(value, list) else 1234.0 if isinstance(value, float) else value


@pytest.mark.parametrize("columns", [80, 160])
def test_bench_cuts_no_word_of_its_tables(sections, capsys, monkeypatch, columns):
    tables = pytest.importorskip("mtlfast.bench.tables", exc_type=ModuleNotFoundError)
    monkeypatch.setenv("COLUMNS", str(columns))
    for section in sections:
        tables.show(run.facts_of_run(7), [section])
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= columns
        words = printed.split()
        assert {word for column in section.rows[0] for word in column.split()} <= {*words}
        assert " ".join(section.caption.split()) in " ".join(words)
        numbers = [value for row in section.rows for value in row.values() if isinstance(value, float | list)]
        assert words.count("1234") == len(numbers)
        quartiles = [value for value in numbers if isinstance(value, list)]
        assert words.count("(123-12345)") == (len(quartiles) if columns == 160 else 0)

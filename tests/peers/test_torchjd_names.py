"""The names that mtlfast takes over from torchjd.aggregation, compared with those of an installed TorchJD."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from mtlfast import aggregation, weighting
from mtlfast.aggregation import GramAggregator
from mtlfast.compat import _torchjd_names as names
from mtlfast.compat import _torchjd_weights as jd_weights
from mtlfast.compat._torchjd_elementwise import DIRECTION_OF

torchjd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")

BASES = {"Aggregator", "GramianWeightedAggregator", "WeightedAggregator", "Weighting"}
NO_GRAM_AGGREGATOR_HERE = {"ExcessMTL", "GradDrop", "TrimmedMean"}
# What accelerate() runs without a solver of its own: the weights need no Gram matrix, or are another weighting's.
NO_SOLVER = {"Constant", "CRMOGM", "Mean", "Random", "Sum"}


def method_of(name: str) -> str:
    return name.removesuffix("Weighting")


def parameters(constructor) -> list[inspect.Parameter]:
    return list(inspect.signature(constructor).parameters.values())


def test_every_name_of_a_method_that_is_here():
    methods = [name for name in torchjd.__all__ if name not in BASES]
    here = {name for name in methods if method_of(name) not in NO_GRAM_AGGREGATOR_HERE}
    assert {method_of(name) for name in methods} - {m.__name__ for m in gram_aggregators()} == NO_GRAM_AGGREGATOR_HERE
    assert set(names.__all__) == here
    for name in names.__all__:
        kind = GramAggregator if name in vars(aggregation) else names.Weighting
        assert issubclass(getattr(names, name), kind), name
        assert getattr(names, name).__name__ == name


def gram_aggregators() -> list[type[GramAggregator]]:
    listed = [method for methods in aggregation.FAMILIES.values() for method in methods]
    return [method for method in listed if issubclass(method, GramAggregator)]


@pytest.mark.parametrize("name", names.__all__)
def test_torchjds_arguments_come_first(name):
    ours = getattr(names, name)
    takes = [(p.name, p.default) for p in parameters(ours.of if issubclass(ours, names.Weighting) else ours)]
    wanted = [(p.name, p.default) for p in parameters(getattr(torchjd, name))]
    assert takes[: len(wanted)] == wanted


def test_arguments_by_position_mean_what_they_mean_there():
    gram = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
    assert names.CAGrad(0.5, 1e-3).norm_eps == torchjd.CAGrad(0.5, 1e-3).norm_eps == 1e-3
    assert names.CAGrad(0.5, rescale=1).rescale == 1
    assert names.GradVac(0.3, 1e-6, "fixed").order == "fixed"
    smoothed, there = (face.CRMOGMWeighting(face.UPGradWeighting(), alpha=0.5) for face in (names, torchjd))
    for _ in range(3):
        assert torch.allclose(smoothed(gram), there(gram), atol=1e-4)


def test_the_page_names_what_accelerate_leaves_alone():
    page = Path(__file__).parents[2] / "docs" / "migrate.md"
    if not page.exists():
        pytest.skip("needs the checkout")
    items = [" ".join(item.split()) for item in re.split(r"\n- |\n\n", page.read_text())]
    (left_alone,) = [item for item in items if "pass through untouched" in item]
    methods = {method_of(name) for name in torchjd.__all__ if name not in BASES}
    accelerated = {method_of(name) for name in jd_weights.WEIGHTS_OF} | NO_SOLVER
    accelerated |= {"ConFIG", "ExcessMTL", *DIRECTION_OF}
    assert methods & set(re.findall(r"\w+", left_alone)) == methods - accelerated


# How constructors of mtlfast.weighting differ from torchjd.scalarization's, as the table in docs/migrate.md has it.
SCALARIZATIONS = {
    "the same arguments": ["Constant", "COSMOS", "PBI", "STCH"],
    "the same; an optional `num_tasks` beside": ["Mean", "Sum", "Random", "GeometricMean"],
    "`num_tasks` in place of `shape`": ["FAMO", "IMTLL", "UW"],
    "`num_tasks` comes first": ["DWA"],
}


def test_the_page_says_how_constructors_of_weightings_differ():
    theirs = pytest.importorskip("torchjd.scalarization", reason="needs the optional group peers")
    assert {name for names in SCALARIZATIONS.values() for name in names} == {*theirs.__all__} - {"Scalarizer"}
    for how, methods in SCALARIZATIONS.items():
        for name in methods:
            ours = [(p.name, p.default) for p in parameters(getattr(weighting, name))]
            wanted = [(p.name, p.default) for p in parameters(getattr(theirs, name))]
            if "beside" in how:
                assert ours == [*wanted, ("num_tasks", None)], name
            elif "place" in how:
                assert wanted[0][0] == "shape", name
                assert ours[: len(wanted)] == [("num_tasks", inspect.Parameter.empty), *wanted[1:]], name
            elif "first" in how:
                assert ours[: len(wanted) + 1] == [("num_tasks", inspect.Parameter.empty), *wanted], name
            else:
                assert ours == wanted, name
    page = Path(__file__).parents[2] / "docs" / "migrate.md"
    if page.exists():
        rows = [line for line in page.read_text().splitlines() if line.startswith("| `")]
        for how, methods in SCALARIZATIONS.items():
            (row,) = [row for row in rows if re.findall(r"`(\w+)`", row.split("|")[1]) == methods]
            assert how in row, row

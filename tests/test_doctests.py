"""Every `>>>` example in a docstring of mtlfast prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import mtlfast

# `python -m mtlfast` runs on import; the command line and the benchmark have no examples and need optional packages.
NOT_IMPORTED = ("mtlfast.__main__", "mtlfast._cli", "mtlfast._methods", "mtlfast.bench")
# What a newcomer meets first has an example.
SHOWN = (
    "ConflictMonitor",
    "FAMO",
    "PCGrad",
    "StepResult",
    "SurgeryOptimizer",
    "TaskGradients",
    "UPGrad",
    "UW",
    "backward",
    "combine",
    "gram",
    "parameter_groups",
)


def examples() -> list[doctest.DocTest]:
    finder, found = doctest.DocTestFinder(exclude_empty=True), []
    for module in pkgutil.walk_packages(mtlfast.__path__, "mtlfast."):
        if not module.name.startswith(NOT_IMPORTED) and module.name != "mtlfast._C":
            found += [test for test in finder.find(importlib.import_module(module.name)) if test.examples]
    return found


EXAMPLES = {test.name: test for test in examples()}


@pytest.mark.whole
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_prints_what_it_says(name):
    report: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(EXAMPLES[name], out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", SHOWN)
def test_it_has_an_example(name):
    assert name in {example.rsplit(".", 1)[-1] for example in EXAMPLES}

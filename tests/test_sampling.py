"""The sample of a grid keeps every value that a test names, is the same in all processes, and ten turns take all."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from sampling import MOST, TURNS, chosen, sample, takes_long

CASES = [
    {"dtype": dtype, "num_tasks": num_tasks, "name": name, "device": "cpu"}
    for dtype, num_tasks, name in itertools.product(
        [torch.float32, torch.bfloat16], range(1, 8), [f"method {i}" for i in range(30)]
    )
]


def values(indices, *names):
    return {tuple(CASES[i][name] for name in names) for i in indices}


@pytest.mark.parametrize("seed", range(5))
def test_every_value_of_every_parameter_stays(seed):
    kept = chosen(CASES, "test_a", grid="sample", seed=str(seed))
    for name in CASES[0]:
        assert values(kept, name) == values(range(len(CASES)), name)
    assert len(kept) < len(CASES) / 4


def test_combinations_stay_where_they_are_asked_for():
    together = ("dtype", "name")
    assert values(sample(CASES, "0"), *together) != values(range(len(CASES)), *together)
    assert values(sample(CASES, "0", together), *together) == values(range(len(CASES)), *together)


def test_a_large_grid_gives_as_many_as_it_may_and_a_small_one_all():
    grid = [{"i": i % 3} for i in range(1000)]
    assert len(sample(grid, "0")) == MOST
    assert chosen(grid[:MOST], "test_a", grid="sample") == set(range(MOST))
    assert chosen(grid, "test_a", grid="all") == set(range(1000))


def test_a_new_value_adds_one_case():
    grid = [{"i": i, "j": j} for i in range(40) for j in range(10)]
    assert len(sample(grid, "0")) == 40
    assert len(sample([*grid, *({"i": 40, "j": j} for j in range(10))], "0")) == 41


def test_the_seed_decides():
    assert sample(CASES, "0") == sample(CASES, "0")
    assert sample(CASES, "0") != sample(CASES, "1")


def test_ten_turns_take_the_whole_grid_and_the_sample_in_each():
    turns = [chosen(CASES, "test_a", grid=str(turn), seed=str(turn)) for turn in range(TURNS)]
    assert set.union(*turns) == set(range(len(CASES)))
    for turn, taken in enumerate(turns):
        assert taken >= chosen(CASES, "test_a", grid="sample", seed=str(turn))
        assert len(taken) < len(CASES) / 2


def test_what_takes_long_runs_in_its_turn_and_seldom_else():
    names = [f"test_{i}" for i in range(200)]
    for name in names:
        turns = [takes_long(name, str(turn), "0") for turn in range(TURNS)]
        assert sum(turns) in (2, TURNS)  # in its two turns, or by the seed in all
        assert takes_long(name, "all")
    assert 20 < sum(takes_long(name, "sample", "1") for name in names) < 60
    assert [takes_long(name, "sample", "1") for name in names] != [takes_long(name, "sample", "2") for name in names]


TESTS = """
import pytest

@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("i", range(100))
def test_grid(name, i): pass

@pytest.mark.grid("i", "name")
@pytest.mark.parametrize(("i", "name"), [(i, name) for i in range(20) for name in "ab" for _ in range(5)])
def test_combinations(i, name): pass

@pytest.mark.parametrize("where", ["here", pytest.param("on a GPU", marks=[pytest.mark.cuda, pytest.mark.skip])])
@pytest.mark.parametrize("i", range(50))
def test_what_can_run_is_sampled_apart(i, where): pass

def test_alone(): pass

@pytest.mark.long
def test_long(): pass
"""


def outcome(tmp_path, *arguments: str, **environment: str) -> tuple[str, str]:
    """The outcome in words of pytest over TESTS with this folder's conftest, and what it said of the grids."""
    (tmp_path / "test_some.py").write_text(TESTS)
    here = os.path.dirname(__file__)
    env = {key: value for key, value in os.environ.items() if key not in ("MTLFAST_GRID", "MTLFAST_SEED")}
    env |= {"PYTHONPATH": os.pathsep.join([here, *sys.path]), **environment}
    markers = "markers=cuda\n  native\n  grid\n  long"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-c", "/dev/null", "-o", markers]
    command += ["--rootdir", str(tmp_path), "-p", "no:cacheprovider", *arguments, str(tmp_path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    *_, said, counts = run.stdout.strip().splitlines()
    return counts.split(" in ")[0].split(",")[0], said


def test_pytest_takes_the_sample_and_says_so(tmp_path):
    assert outcome(tmp_path) == (
        "191 passed",
        "grids: MTLFAST_GRID=sample MTLFAST_SEED=0, 241 of 502 cases",
    )
    assert outcome(tmp_path, MTLFAST_GRID="all") == (
        "452 passed",
        "grids: MTLFAST_GRID=all MTLFAST_SEED=0, 502 of 502 cases",
    )


def test_all_workers_agree_and_say_the_same(tmp_path):
    pytest.importorskip("xdist")
    assert outcome(tmp_path, "-n", "2", MTLFAST_SEED="some") == (
        "191 passed",
        "grids: MTLFAST_GRID=sample MTLFAST_SEED=some, 241 of 502 cases",
    )


def test_what_a_developer_asks_for_by_name_is_not_sampled_away(tmp_path):
    assert outcome(tmp_path, "-k", "test_grid and 77")[0] == "2 passed"

"""Batches from several tasks' data."""

import collections

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from mtlfast.training import TaskSampler

SIZES = [900, 90, 10]


def counts(sampler: TaskSampler, epochs: int = 1) -> list[float]:
    """The share of each task's samples."""
    drawn = collections.Counter(task for _ in range(epochs) for batch in sampler for task in sampler.tasks_of(batch))
    return [drawn[task] / drawn.total() for task in range(len(sampler.sizes))]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("strategy", "beta", "shares"),
    [
        ("proportional", 0.5, [0.9, 0.09, 0.01]),
        ("uniform", 0.5, [1 / 3] * 3),
        ("temperature", 0.5, [30 / (30 + 90**0.5 + 10**0.5), 90**0.5 / (30 + 90**0.5 + 10**0.5), None]),
        ("temperature", 0.0, [1 / 3] * 3),
        ("round_robin", 0.5, [1 / 3] * 3),
    ],
)
def test_shares(strategy, beta, shares, mixed):
    sampler = TaskSampler(SIZES, 4, strategy, beta=beta, mixed=mixed, num_batches=3000)
    seen = counts(sampler)
    for share, wanted in zip(seen, shares, strict=True):
        assert wanted is None or share == pytest.approx(wanted, abs=0.03)
    if strategy != "round_robin":
        assert sampler.probabilities()[:2] == pytest.approx(shares[:2])


def test_batches_are_of_one_task_or_mixed():
    tasks = [set(sampler.tasks_of(batch)) for sampler in (TaskSampler(SIZES, 8, "uniform"),) for batch in sampler]
    assert all(len(of_batch) == 1 for of_batch in tasks)
    assert {task for of_batch in tasks for task in of_batch} == {0, 1, 2}
    mixed = TaskSampler(SIZES, 8, "uniform", mixed=True)
    assert max(len(set(mixed.tasks_of(batch))) for batch in mixed) == 3
    in_turn = TaskSampler(SIZES, 2, "round_robin", num_batches=7)
    assert [in_turn.tasks_of(batch)[0] for batch in in_turn] == [0, 1, 2, 0, 1, 2, 0]
    assert [in_turn.tasks_of(batch)[0] for batch in in_turn] == [1, 2, 0, 1, 2, 0, 1]  # the next epoch goes on


def test_every_sample_comes_before_one_comes_again():
    sampler = TaskSampler([7, 3], 5, "uniform", mixed=True, num_batches=4, seed=3)
    seen = collections.defaultdict(list)
    for _ in range(6):
        for batch in sampler:
            assert len(batch) == 5
            for index, task in zip(batch, sampler.tasks_of(batch), strict=True):
                seen[task].append(index)
    for task, size in enumerate((7, 3)):
        rounds = [seen[task][i : i + size] for i in range(0, len(seen[task]) - size + 1, size)]
        assert len(rounds) > 3
        first = 0 if task == 0 else 7
        assert all(sorted(of_round) == list(range(first, first + size)) for of_round in rounds)
        assert rounds[0] != rounds[1]


def test_the_seed_decides():
    def batches(seed: int, epochs: int = 2) -> list[list[int]]:
        sampler = TaskSampler(SIZES, 4, num_batches=20, seed=seed)
        return [batch for _ in range(epochs) for batch in sampler]

    assert batches(1) == batches(1)
    assert batches(1) != batches(2)
    assert batches(1)[:20] != batches(1)[20:]
    state = torch.random.get_rng_state()
    batches(1)
    assert torch.equal(torch.random.get_rng_state(), state)  # torch's own generator is left alone


@pytest.mark.parametrize("strategy", ["proportional", "round_robin"])
@pytest.mark.parametrize("stop", [(0, 0), (0, 7), (2, 0), (2, 13)])
def test_resumes_where_it_was(strategy, stop):
    def make() -> TaskSampler:
        return TaskSampler(SIZES, 4, strategy, mixed=True, num_batches=20, seed=5)

    whole, epochs = make(), [[] for _ in range(4)]
    for epoch in epochs:
        epoch.extend(whole)
    first, (epoch, batch) = make(), stop
    for _ in range(epoch):
        list(first)
    iterator = iter(first)
    for _ in range(batch):
        next(iterator)
    saved = first.state_dict()
    assert saved == {"epoch": epoch, "batch": batch}
    second = make()
    second.load_state_dict(saved)
    assert list(second) == epochs[epoch][batch:]
    assert list(second) == epochs[epoch + 1]
    second.load_state_dict(saved)  # back again
    assert list(second) == epochs[epoch][batch:]


def test_works_with_a_data_loader():
    datasets = [TensorDataset(torch.arange(n), torch.full((n,), task)) for task, n in enumerate(SIZES)]
    sampler = TaskSampler(SIZES, 16, "uniform", num_batches=30)
    loader = DataLoader(ConcatDataset(datasets), batch_sampler=sampler, num_workers=2)
    assert len(loader) == 30
    expected = [sampler.tasks_of(batch) for batch in TaskSampler(SIZES, 16, "uniform", num_batches=30)]
    assert [tasks.tolist() for _, tasks in loader] == expected
    assert len(TaskSampler(SIZES, 16)) == 63  # as many as hold all 1000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TaskSampler([], 2), r"TaskSampler: sizes is \[\], expected integers of at least 1"),
        (lambda: TaskSampler([3, 0], 2), r"TaskSampler: sizes is \[3, 0\], expected integers"),
        (lambda: TaskSampler([3], 0), "TaskSampler: batch_size is 0, expected an integer of at least 1"),
        (lambda: TaskSampler([3], 1, "sorted"), "TaskSampler: strategy is 'sorted', expected 'proportional'"),
        (lambda: TaskSampler([3], 1, beta=-1), "TaskSampler: beta is -1, expected a number of at least 0"),
        (lambda: TaskSampler([3], 1, num_batches=0), "TaskSampler: num_batches is 0, expected an integer"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()

"""What loss weightings are given: losses, tasks, feedback and vectors in every form. And their copies and files."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from weightings import WEIGHTINGS, feed, losses_at

from mtlfast import weighting

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS)


def trained(name: str, device: str = "cpu") -> weighting.LossWeighting:
    torch.manual_seed(0)
    made = WEIGHTINGS[name]().to(device)
    for step in range(3):
        made(losses_at(step, device))
        feed(made, step)
    return made


def weigh(made: weighting.LossWeighting, losses, **context) -> torch.Tensor:
    torch.manual_seed(0)
    return made(losses, **context).detach()


@every_weighting
def test_losses_in_every_form(name, device):
    values = losses_at(3, device)
    wanted = weigh(trained(name, device), values)
    for form in (
        list(values),
        tuple(values),
        {"depth": values[0], "normals": values[1], "edges": values[2]},
        (value for value in values),
        [value.reshape(1) for value in values],
        {7: values[0], "a": values[1], None: values[2]}.values(),
    ):
        assert torch.equal(weigh(trained(name, device), form), wanted)
    absent = weigh(trained(name, device), [values[0], None, values[2]])
    assert torch.equal(weigh(trained(name, device), {"a": values[0], "b": None, "c": values[2]}), absent)
    for tasks in ([0, 2], np.array([0, 2]), torch.tensor([0, 2]), (np.int64(0), torch.tensor(2))):
        assert torch.equal(weigh(trained(name, device), values[[0, 2]], tasks=tasks), absent)


@every_weighting
@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ((1, 1), "got task 1 twice, expected each index once"),
        ((0, -1), "got task -1, expected an index of at least 0"),
        ((0, 0.5), "got task 0.5, expected an index of at least 0"),
        ((0, True), "got task True, expected an index of at least 0"),
        ((0, "depth"), "got task 'depth', expected an index of at least 0"),
        (2, "tasks is 2, expected the present tasks' indices"),
        ((0, 3), "got task 3, expected 3 tasks as num_tasks says"),
    ],
)
def test_tasks_that_are_none(name, tasks, message):
    made = trained(name)
    if tasks == (0, 3) and made.num_tasks is None:
        assert made(losses_at(3)[:2], tasks=tasks).isfinite()  # for any number of tasks
        return
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match=f"^{type(made).__name__}: {message}$"):
        made(losses_at(3)[:2], tasks=tasks)
    for key, value in made.state_dict().items():
        assert torch.equal(value.nan_to_num(nan=-7), before[key].nan_to_num(nan=-7))


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([torch.tensor(1.0), 2.0], "loss 1 is a float, expected a scalar Tensor or None"),
        ([np.float32(1)], "loss 0 is a float32, expected a scalar Tensor or None"),
        (np.ones(2), "loss 0 is a float64, expected a scalar Tensor or None"),
        ({"a": torch.ones(()), "b": 3}, "loss 1 is a int, expected a scalar Tensor or None"),
        (1.0, "losses is a float, expected a list, a dict or a tensor"),
        (None, "losses is a NoneType, expected a list, a dict or a tensor"),
        (torch.tensor(1.0), r"losses is a tensor of shape \[\], expected \[K\] or a list"),
        (torch.ones(0), "got 0 losses, none of them present, expected at least one"),
        ({}, "got 0 losses, none of them present, expected at least one"),
        (torch.ones(2, dtype=torch.complex64), "losses are complex64, expected real numbers"),
        (torch.ones(2, dtype=torch.bool), "losses are bool, expected real numbers"),
    ],
)
def test_losses_that_are_none(losses, message):
    with pytest.raises(ValueError, match=f"^Sum: {message}"):
        weighting.Sum()(losses)


def test_losses_that_are_integers():
    assert weighting.Constant([0.5, 0.25])(torch.tensor([1, 2])).item() == 1


# Each takes feedback, and a state of it that the feedback moves.
FED = {
    "InversePerformance": ("metrics", "performance"),
    "DynamicTaskPrioritization": ("metrics", "performance"),
    "DWA": ("losses", "last"),
    "FAMO": ("losses", "logits"),
}


@pytest.mark.parametrize("name", FED)
def test_feedback_in_every_form(name, device):
    what, state = FED[name]
    wanted = None
    for form in (
        [0.25, 0.5, 0.75],
        (0.25, np.float32(0.5), torch.tensor(0.75)),
        {"a": 0.25, "b": 0.5, "c": 0.75},
        np.array([0.25, 0.5, 0.75]),
        torch.tensor([0.25, 0.5, 0.75], device=device, requires_grad=True),
        (number for number in (0.25, 0.5, 0.75)),
    ):
        made = trained(name, device)
        before = getattr(made, state).clone()
        made.update(**{what: form})
        assert not torch.equal(getattr(made, state), before)
        wanted = getattr(made, state) if wanted is None else wanted
        assert torch.equal(getattr(made, state), wanted)
    partly = trained(name, device)
    partly.update(**{what: [0.25, None, 0.75]})
    assert torch.equal(getattr(partly, state)[1], trained(name, device)._buffers[state][1])


@pytest.mark.parametrize("name", FED)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.5, "a", 0.5], "entry 1 of {what} is a str, expected a number, a scalar Tensor or None"),
        ([0.5, True, 0.5], "entry 1 of {what} is a bool, expected a number, a scalar Tensor or None"),
        ([0.5, 0.5], "got 2 {what}, expected 3 as num_tasks says"),
        ([None, None, None], "got 3 {what}, none of them present, expected at least one"),
        (torch.ones(3, 1), r"{what} is a tensor of shape \[3, 1\], expected \[K\] or a list"),
        (0.5, "{what} is a float, expected a list, a dict or a tensor"),
    ],
)
def test_feedback_that_is_none(name, given, message):
    what, _ = FED[name]
    made = trained(name)
    before = copy.deepcopy(made.state_dict())
    with pytest.raises(ValueError, match=f"^{name}: {message.format(what=what)}"):
        made.update(**{what: given})
    for key, value in made.state_dict().items():
        assert torch.equal(value.nan_to_num(nan=-7), before[key].nan_to_num(nan=-7))


# Each with a vector as its argument.
VECTORS = {
    "Constant": lambda v: weighting.Constant(v),
    "InverseSampleSize": lambda v: weighting.InverseSampleSize(v),
    "ClassBalanced": lambda v: weighting.ClassBalanced(v),
    "FAMO": lambda v: weighting.FAMO(2, min_losses=v),
    "GradNorm": lambda v: weighting.GradNorm(2, initial_losses=v),
    "Tchebycheff": lambda v: weighting.Tchebycheff(v),
    "Tchebycheff, reference": lambda v: weighting.Tchebycheff(None, v),
    "STCH": lambda v: weighting.STCH(1.0, v),
    "STCH, reference": lambda v: weighting.STCH(1.0, None, v),
    "PBI": lambda v: weighting.PBI(1.0, v),
    "PBI, reference": lambda v: weighting.PBI(1.0, [1, 1], v),
    "COSMOS": lambda v: weighting.COSMOS(1.0, v),
    "CurriculumSchedule": lambda v: weighting.CurriculumSchedule(v),
    "AnnealingSchedule": lambda v: weighting.AnnealingSchedule(v, [1, 1], 2),
    "AnnealingSchedule, end": lambda v: weighting.AnnealingSchedule([1, 1], v, 2),
}
every_vector = pytest.mark.parametrize("name", VECTORS)


@every_vector
def test_vectors_in_every_form(name):
    losses = torch.tensor([5.0, 6.0])
    wanted = VECTORS[name](torch.tensor([2.0, 3.0]))(losses)
    for form in ([2, 3], (2.0, 3.0), np.array([2, 3]), [np.float32(2), torch.tensor(3)], torch.tensor([2, 3])):
        assert torch.equal(VECTORS[name](form)(losses), wanted)


@every_vector
@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([torch.nan, 1]),
        [1, torch.inf],
        torch.tensor([1 + 2j, 1j]),
        [[1, 2], [3, 4]],
        torch.ones(2, 2),
        torch.tensor(1.0),
        [True, False],
        [],
        "ab",
        1.0,
    ],
    ids=str,
)
def test_vectors_that_are_none(name, wrong):
    with pytest.raises(ValueError, match=rf"^{name.split(',')[0]}: \w+ (is|has shape) .*, expected .*(number|\[)"):
        VECTORS[name](wrong)


def test_a_preference_that_is_divided_by():
    with pytest.raises(ValueError, match=r"PBI: weights is \[0, 0\], expected n finite numbers, not all 0"):
        weighting.PBI(1.0, [0, 0])
    made = weighting.PBI(1.0, [1, 2])
    with pytest.raises(ValueError, match=r"PBI: weights is \[0, 0\], expected n finite numbers, not all 0"):
        made.weights = [0, 0]
    assert made.weights.tolist() == [1, 2]
    made.weights = [3, 4]
    assert made.weights.tolist() == [3, 4]


@pytest.mark.parametrize("number", [np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=repr)
def test_numbers_of_tasks_in_every_form(number):
    for method in [method for methods in weighting.FAMILIES.values() for method in methods]:
        try:
            made = method(3)
        except (TypeError, ValueError):
            continue  # its first argument is another one
        if made.num_tasks is not None:
            made = method(number)
            assert type(made.num_tasks) is int
            assert made(losses_at(0)).isfinite()
    for wrong in (True, 3.0, "3", 0, torch.ones(2), None):
        with pytest.raises(ValueError, match=r"DWA: num_tasks is .*, expected an integer of at least 1"):
            weighting.DWA(wrong)


def test_kinds_of_tasks():
    assert weighting.UW(2, np.array([True, False])).factors.tolist() == [1, 0.5]
    assert weighting.UW(2, torch.tensor([1, 0])).factors.tolist() == [1, 0.5]
    with pytest.raises(ValueError, match=r"UW: classification is \['yes', 'no'\], expected 2 of True and False"):
        weighting.UW(2, ["yes", "no"])


@every_weighting
@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "torch.save"])
def test_copies(name, how):
    made = trained(name)
    if how == "pickle":
        other = pickle.loads(pickle.dumps(made))
    elif how == "torch.save":
        torch.save(made, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = getattr(copy, how)(made)
    assert type(other) is type(made)
    assert vars(other).keys() == vars(made).keys()
    before = copy.deepcopy(made.state_dict())
    wanted = weigh(copy.deepcopy(made), losses_at(3))
    assert torch.equal(weigh(other, losses_at(3)), wanted)
    if how != "copy":  # of which torch's modules share their tensors
        feed(other, 5)
        for key, value in made.state_dict().items():
            assert torch.equal(value.nan_to_num(nan=-7), before[key].nan_to_num(nan=-7))


@every_weighting
def test_files_hold_tensors_alone(name):
    for made in (WEIGHTINGS[name](), trained(name)):
        model = torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "weighting": made})
        assert all(type(value) is torch.Tensor for value in model.state_dict().values())
        torch.save(model.state_dict(), file := io.BytesIO())
        file.seek(0)
        again = WEIGHTINGS[name]()
        torch.nn.ModuleDict({"net": torch.nn.Linear(2, 2), "weighting": again}).load_state_dict(torch.load(file))
        assert torch.equal(weigh(again, losses_at(3)), weigh(made, losses_at(3)))

"""Numbers and vectors that users give: Python's, numpy's and torch's, in every form that has a plain meaning."""

import numpy as np
import pytest
import torch

from mtlfast._settings import Choice, Or, Real, Whole
from mtlfast._vectors import vector


class Owner:
    real = Real(0, 1)
    whole = Whole(1)
    word = Choice("sum", "mean")
    number = Choice(0, 1, 2)
    either = Or(Real(0, least_itself=False), "mean", None)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("real", np.float32(0.5), 0.5),
        ("real", np.float64(0.5), 0.5),
        ("real", np.int64(1), 1),
        ("real", np.array(0.25), 0.25),
        ("real", torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        ("real", torch.tensor(0.5, requires_grad=True), 0.5),
        ("whole", np.int32(3), 3),
        ("whole", torch.tensor(3), 3),
        ("word", np.str_("mean"), "mean"),
        ("number", np.int64(2), 2),
        ("number", torch.tensor(1), 1),
        ("either", np.float32(2), 2.0),
        ("either", np.str_("mean"), "mean"),
        ("either", None, None),
    ],
)
def test_scalars_become_numbers_of_pythons(name, given, kept):
    owner = Owner()
    setattr(owner, name, given)
    assert getattr(owner, name) == kept
    assert type(getattr(owner, name)) is type(kept)


@pytest.mark.parametrize(
    ("name", "given", "shown"),
    [
        ("real", True, "True"),
        ("real", np.True_, "True"),
        ("real", torch.tensor(True), "True"),
        ("real", np.float32("nan"), "nan"),
        ("real", torch.tensor(torch.inf), "inf"),
        ("real", 1j, "1j"),
        ("real", "0.5", "'0.5'"),
        ("real", 10**400, str(10**400)),
        ("real", torch.tensor([0.5]), r"\[0.5\]"),
        ("real", np.ones((2, 2)), r"a ndarray of shape \[2, 2\]"),
        ("whole", np.float32(3), "3.0"),
        ("whole", True, "True"),
        ("word", ["mean"], r"\['mean'\]"),
        ("word", torch.ones(2), r"\[1.0, 1.0\]"),
        ("number", True, "True"),
        ("either", torch.zeros(()), "0.0"),
        ("either", torch.ones(2), r"\[1.0, 1.0\]"),
    ],
)
def test_what_is_no_such_number_is_refused(name, given, shown):
    with pytest.raises(ValueError, match=f"Owner: {name} is {shown}, expected "):
        setattr(Owner(), name, given)


@pytest.mark.parametrize(
    "given",
    [
        [1, 2.5],
        (1, np.float32(2.5)),
        [torch.tensor(1), torch.tensor(2.5)],
        np.array([1, 2.5]),
        np.array([2.5, 1], dtype=np.float16)[::-1],
        torch.tensor([1, 2.5], dtype=torch.bfloat16),
        torch.tensor([1, 2.5], requires_grad=True),
        (x for x in (1, 2.5)),
    ],
)
def test_vectors_are_float64_copies(given):
    made = vector("Owner", "v", given, length=2, least=1)
    assert made.tolist() == [1, 2.5]
    assert made.dtype == torch.float64
    assert not made.requires_grad


def test_a_vector_is_a_copy():
    given = torch.ones(2, dtype=torch.float64)
    vector("Owner", "v", given).zero_()
    assert given.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("given", "limits", "message"),
    [
        ([1, torch.nan], {}, r"v is \[1, nan\], expected n finite numbers$"),
        (np.array([np.inf]), {}, r"v is \[inf\], expected n finite numbers"),
        ([10**400], {}, "v is .*, expected n finite numbers"),
        (torch.tensor([1 + 2j]), {}, r"v is \[\(1\+2j\)\], expected n finite numbers"),
        ([1j], {}, r"v is \[1j\], expected n finite numbers"),
        ([True, False], {}, r"v is \[True, False\], expected n finite numbers"),
        (torch.tensor([True]), {}, r"v is \[True\], expected n finite numbers"),
        (["a"], {}, r"v is \['a'\], expected n finite numbers"),
        ("ab", {}, "v is 'ab', expected n finite numbers"),
        ({"a": 1}, {}, r"v is \{'a': 1\}, expected n finite numbers"),
        (3, {}, "v is 3, expected n finite numbers"),
        (None, {}, "v is None, expected n finite numbers"),
        ([], {}, r"v is \[\], expected n finite numbers"),
        (torch.tensor(3.0), {}, r"v has shape \[\], expected \[n\]"),
        ([[1], [2]], {}, r"v is \[\[1\], \[2\]\], expected n finite numbers"),
        (np.ones((2, 2)), {}, r"v is a ndarray of shape \[2, 2\], expected n finite numbers"),
        (torch.ones(2, 2), {}, r"v has shape \[2, 2\], expected \[n\]"),
        ([1, 2], {"length": 3}, r"v has shape \[2\], expected \[3\]"),
        ([0, -1], {"least": 0}, r"v is \[0, -1\], expected n finite numbers of at least 0$"),
        ([0, 1], {"least": 0, "least_itself": False}, r"v is \[0, 1\], expected n finite numbers above 0$"),
        ([0, 0], {"not_all_zero": True}, r"v is \[0, 0\], expected n finite numbers, not all 0$"),
    ],
)
def test_what_is_no_such_vector_is_refused(given, limits, message):
    with pytest.raises(ValueError, match=f"^Owner: {message}"):
        vector(Owner(), "v", given, **limits)

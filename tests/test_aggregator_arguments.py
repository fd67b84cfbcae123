"""Aggregators' arguments are taken in every form with a plain meaning. All others raise one sentence."""

import pytest
import torch
from test_aggregation import gram_of

from mtlfast.aggregation import (
    CRMOGM,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ClipNorm,
    ConFIG,
    Constant,
    CrossNorm,
    DualProj,
    FairGrad,
    GradVac,
    Krum,
    MoDo,
    NashMTL,
    NormBalance,
    PCGrad,
    SDMGrad,
    UPGrad,
)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PCGrad(reduction="max"), "PCGrad: reduction is 'max', expected 'sum' or 'mean'"),
        (lambda: PCGrad(order="up"), "PCGrad: order is 'up', expected 'random' or 'fixed'"),
        (lambda: Constant(torch.ones(2, 2)), r"Constant: weights have shape \[2, 2\], expected \[K\]"),
        (lambda: GradVac(beta=1.5), r"GradVac: beta is 1.5, expected a number in \[0, 1\]"),
        (lambda: MGDA(epsilon=0.0), "MGDA: epsilon is 0.0, expected a number above 0 or None"),
        (lambda: MGDA(max_iters=0), "MGDA: max_iters is 0, expected an integer of at least 1"),
        (lambda: MGDA(norms="l1"), "MGDA: norms is 'l1', expected 'none', 'l2', 'loss' or 'loss\\+'"),
        (
            lambda: MGDA(norms="loss").weights(gram_of()),
            "MGDA: norms is 'loss' and losses is None, expected the tasks'",
        ),
        (lambda: CAGrad(-1.0), "CAGrad: c is -1.0, expected a number of at least 0"),
        (lambda: CAGrad(float("nan")), "CAGrad: c is nan, expected a number of at least 0"),
        (lambda: CAGrad(0.5, rescale=3), "CAGrad: rescale is 3, expected 0, 1 or 2"),
        (lambda: UPGrad(torch.ones(2, 2)), r"UPGrad: pref_vector has shape \[2, 2\], expected \[K\]"),
        (lambda: UPGrad(torch.ones(2)).weights(gram_of()), r"UPGrad: got tasks \[0, 1, 2\], expected 2 tasks as there"),
        (lambda: DualProj(reg_eps=-1), "DualProj: reg_eps is -1, expected a number of at least 0"),
        (lambda: PCD(tau=2), r"PCD: tau is 2, expected a number in \[0, 1\]"),
        (lambda: PCD(tau=torch.tensor([0.1, 3.0])), r"PCD: tau is tensor.*, expected numbers in \[0, 1\]"),
        (lambda: PCD(tau=torch.ones(1, 1)), r"PCD: tau has shape \[1, 1\], expected a number or \[K - 1\]"),
        (lambda: PCD(beta=1.0), r"PCD: beta is 1.0, expected a number in \[0, 1\)"),
        (lambda: Krum(-1), "Krum: n_byzantine is -1, expected an integer of at least 0"),
        (
            lambda: Krum(1).weights(gram_of()),
            "Krum: got 3 tasks, expected at least 4 for n_byzantine=1 and n_selected=1",
        ),
        (lambda: AlignedMTL(scale_mode="mean"), "AlignedMTL: scale_mode is 'mean', expected 'min', 'median' or 'rmse'"),
        (lambda: AlignedMTL(torch.ones(2, 2)), r"AlignedMTL: pref_vector has shape \[2, 2\], expected \[K\]"),
        (lambda: ConFIG(length="sum"), "ConFIG: length is 'sum', expected 'projection', 'mean', .* or a task's index"),
        (lambda: ConFIG(length=-1), "ConFIG: length is -1, expected"),
        (lambda: ConFIG(length=3).weights(gram_of()), "ConFIG: got 3 tasks, expected task 3 among them"),
        (lambda: NashMTL(n_tasks=0), "NashMTL: n_tasks is 0, expected an integer of at least 1 or None"),
        (
            lambda: NashMTL(pref_vector=torch.tensor([1.0, 0.0])),
            r"NashMTL: pref_vector is \[1.0, 0.0\], expected K finite numbers above 0",
        ),
        (lambda: NashMTL(pref_vector=torch.ones(2, 2)), r"NashMTL: pref_vector has shape \[2, 2\], expected \[K\]"),
        (lambda: NashMTL(max_norm=-1), "NashMTL: max_norm is -1, expected a number of at least 0"),
        (lambda: NashMTL(update_weights_every=0), "NashMTL: update_weights_every is 0, expected an integer of at"),
        (lambda: FairGrad(-1.0), "FairGrad: alpha is -1.0, expected a number of at least 0"),
        (lambda: NormBalance("largest"), "NormBalance: target is 'largest', expected 'mean', 'geometric', .* index"),
        (lambda: NormBalance(5).weights(gram_of()), "NormBalance: got 3 tasks, expected task 5 among them"),
        (lambda: ClipNorm(0), "ClipNorm: max_norm is 0, expected a number above 0 or 'mean'"),
        (lambda: CrossNorm().weights(gram_of()), "CrossNorm: got 3 tasks, expected at most 2"),
        (lambda: MoDo(gamma=0), "MoDo: gamma is 0, expected a number above 0"),
        (lambda: SDMGrad(n_iter=1.5), "SDMGrad: n_iter is 1.5, expected an integer of at least 1"),
        (lambda: CRMOGM(MGDA(), alpha=-0.1), r"CRMOGM: alpha is -0.1, expected a number in \[0, 1\]"),
        (lambda: CRMOGM(MGDA(), 0.5, torch.ones(2, 2)), r"CRMOGM: initial_weights has shape \[2, 2\], expected \[K\]"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


VECTORS = {
    "CAGrad": lambda v: CAGrad(0.5, pref_vector=v),
    "Constant": lambda v: Constant(v),
    "MGDA": lambda v: MGDA(min_weights=v),
    "UPGrad": lambda v: UPGrad(v),
    "DualProj": lambda v: DualProj(v),
    "AlignedMTL": lambda v: AlignedMTL(v),
    "ConFIG": lambda v: ConFIG(v),
    "NashMTL": lambda v: NashMTL(pref_vector=v),
    "SDMGrad": lambda v: SDMGrad(pref_vector=v),
    "CRMOGM": lambda v: CRMOGM(MGDA(), initial_weights=v),
    "PCD": lambda v: PCD(tau=v),
}
every_vector = pytest.mark.parametrize("name", VECTORS)


@every_vector
def test_vectors_in_every_form_are_one(name):
    numpy = pytest.importorskip("numpy")
    gram = gram_of(num_tasks=4 if name == "PCD" else 3)
    wanted = VECTORS[name](torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)).weights(gram)
    for form in ([0.2, 0.5, 0.3], (0.2, 0.5, 0.3), numpy.array([0.2, 0.5, 0.3]), [numpy.float64(0.2), 0.5, 0.3]):
        assert torch.equal(VECTORS[name](form).weights(gram), wanted)
    given = torch.tensor([0.2, 0.5, 0.3], requires_grad=True)
    made = VECTORS[name](given)
    assert not any(buffer.requires_grad for buffer in made.buffers())
    assert all(buffer.dtype == torch.float64 for buffer in made.buffers())


@every_vector
@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([float("nan"), 1.0]),
        [float("inf"), 1.0],
        torch.tensor([1 + 2j, 1j]),
        [1 + 2j, 1j],
        torch.tensor([True, False]),
        ["a", "b"],
        "ab",
        [],
        torch.ones(2, 2),
        {"a": 1.0},
        [None, 1.0],
    ],
    ids=repr,
)
def test_what_is_no_vector_is_refused(name, wrong):
    with pytest.raises((ValueError, TypeError), match=f"{name}: "):
        VECTORS[name](wrong)


def test_numbers_in_every_form_are_one():
    numpy = pytest.importorskip("numpy")
    gram = gram_of(num_tasks=6)
    for number in (numpy.float32(0.5), numpy.float64(0.5), torch.tensor(0.5)):
        assert torch.equal(CAGrad(number).weights(gram), CAGrad(0.5).weights(gram))
        assert torch.equal(PCD(tau=number).weights(gram), PCD(tau=0.5).weights(gram))
        assert torch.equal(FairGrad(number).weights(gram), FairGrad(0.5).weights(gram))
    for whole in (numpy.int64(1), numpy.int32(1), torch.tensor(1)):
        assert torch.equal(Krum(whole).weights(gram), Krum(1).weights(gram))
        assert torch.equal(NormBalance(whole).weights(gram), NormBalance(1).weights(gram))
        assert torch.equal(CAGrad(whole).weights(gram), CAGrad(1).weights(gram))
    for no_number in (True, "1", None, 1j, [1.0], numpy.array([1.0, 2.0])):
        with pytest.raises((ValueError, TypeError), match="CAGrad: c is"):
            CAGrad(no_number)

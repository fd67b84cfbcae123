"""ConFIG beside its authors' package, every length model, on 200 random matrices: the same update, to 1e-4."""

import pytest
import torch

from mtlfast.aggregation import ConFIG

conflictfree = pytest.importorskip("conflictfree.grad_operator", reason="needs the optional group peers")
length_model = pytest.importorskip("conflictfree.length_model", reason="needs the optional group peers")

pytestmark = pytest.mark.native

LENGTHS = {
    "projection": length_model.ProjectionLength(),
    "min": length_model.TrackMinimum(),
    "max": length_model.TrackMaximum(),
    "harmonic": length_model.TrackHarmonicAverage(),
    "mean": length_model.TrackArithmeticAverage(),
    "geometric": length_model.TrackGeometricAverage(),
    1: length_model.TrackSpecific(1),
}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)  # of its weights
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("length", LENGTHS, ids=str)
def test_same_update(length):
    for num_tasks in (2, 3, 8, 20):
        torch.manual_seed(num_tasks)
        for _ in range(50):
            J = torch.randn(num_tasks, num_tasks + 3)
            update = ConFIG(length=length).weights(J @ J.T) @ J
            theirs = conflictfree.ConFIG_update(J, length_model=LENGTHS[length])
            assert torch.allclose(update, theirs, rtol=0, atol=1e-4), (num_tasks, J)
            if num_tasks == 2:
                theirs = conflictfree.ConFIG_update_double(J[0], J[1], length_model=LENGTHS[length])
                assert torch.allclose(update, theirs, rtol=0, atol=1e-4), J

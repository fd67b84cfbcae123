"""mtlfast's names in TorchJD's own functions, beside TorchJD's: attributes, setters, weights, hooks, copies."""

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor, nn

import mtlfast
from mtlfast.compat import torchjd as faces
from mtlfast.compat.torchjd import accelerate, restore

jd = pytest.importorskip("torchjd.aggregation", reason="needs the optional group peers")
autojac = pytest.importorskip("torchjd.autojac", reason="needs the optional group peers")
pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")

ARGUMENTS = {
    "CAGrad": (0.5,),
    "Constant": (torch.tensor([0.2, 0.5, 0.3]),),
    "FairGrad": (1.0,),
    "Krum": (0,),
    "NashMTL": (3,),
}
AGGREGATORS = [name for name in faces.__all__ if isinstance(getattr(faces, name), type) and hasattr(jd, name)]
WEIGHTINGS = [name for name in AGGREGATORS if name.endswith("Weighting")]
AGGREGATORS = [name for name in AGGREGATORS if name not in WEIGHTINGS]
# Another value of each setting that a method reads.
OTHER = {
    "alpha": 0.5,
    "beta": 0.25,
    "c": 5.0,
    "epsilon": 0.3,
    "gamma": 0.7,
    "lambda_": 2.0,
    "lr": 1e-3,
    "max_norm": 0.01,
    "momentum": 0.1,
    "n_byzantine": 1,
    "n_iter": 1,
    "n_selected": 2,
    "n_tasks": 5,
    "norm_eps": 0.9,
    "pref_vector": torch.tensor([0.7, 0.2, 0.1]),
    "rho": 300.0,
    "scale_mode": "rmse",
    "tau": 0.9,
    "update_weights_every": 2,
    "weights": torch.tensor([1.0, 2.0, 3.0]),
}
KEPT = {  # and read by nothing, as the class says
    ("GradVac", "eps"): 0.5,
    ("FairGrad", "max_iters"): 7,
    ("NashMTL", "optim_niter"): 3,
}
# What changes no weights of the matrices here: it bounds something that is not met, or says what a state is for.
WITHOUT_EFFECT = {("MGDA", "max_iters"), ("PCD", "eps"), ("NashMTL", "n_tasks"), ("NashMTL", "update_weights_every")}


@pytest.fixture(autouse=True)
def _off_again():
    yield
    restore()


def make(module, name: str) -> nn.Module:
    method = name.removesuffix("Weighting")
    if method == "CRMOGM":
        return module.CRMOGMWeighting(module.UPGradWeighting())
    return getattr(module, name)(*ARGUMENTS.get(method, ()))


def matrix() -> Tensor:
    torch.manual_seed(5)
    J = torch.randn(3, 8) * torch.tensor([[1.0], [3.0], [0.5]])
    J[2] -= J[0]  # a conflict
    return J


def settings(name: str) -> list[str]:
    """What can be set on TorchJD's own."""
    theirs = getattr(jd, name)
    found = [key for key, value in inspect.getmembers(theirs) if isinstance(value, property) and value.fset]
    return [*found, *(["weights"] if name == "ConstantWeighting" else [])]


@pytest.mark.parametrize("name", [*AGGREGATORS, *WEIGHTINGS])
def test_every_setting_is_there_and_takes_effect(name):
    method = name.removesuffix("Weighting")
    for key in settings(name):
        if key == "projector":
            continue
        made, untouched = make(faces, name), make(faces, name)
        if (method, key) in KEPT:
            setattr(made, key, KEPT[method, key])
            assert getattr(made, key) == KEPT[method, key]
            continue
        assert hasattr(made, key), key
        value = OTHER.get(key, 1)
        setattr(made, key, value)
        got = getattr(made, key)
        assert torch.allclose(got.float(), value) if isinstance(value, Tensor) else got == value, key
        if (method, key) in WITHOUT_EFFECT:
            continue
        if (method, key) == ("Krum", "n_byzantine"):
            with pytest.raises(ValueError, match="Krum: got 3 tasks"):
                made(gramian_or_matrix(name))
            continue
        assert not torch.equal(steps(made, name), steps(untouched, name)), key


def steps(made: nn.Module, name: str) -> Tensor:
    """What it gives for twenty matrices, one after the other."""
    given = []
    for seed in range(20):
        torch.manual_seed(seed)
        J = torch.randn(3, 4)
        given.append(made(J @ J.T if name.endswith("Weighting") else J))
    return torch.stack(given)


def gramian_or_matrix(name: str) -> Tensor:
    J = matrix()
    return J @ J.T if name.endswith("Weighting") else J


@pytest.mark.parametrize("name", [n for n in (*AGGREGATORS, *WEIGHTINGS) if n.startswith(("UPGrad", "DualProj"))])
def test_the_projector_is_read_at_each_step(name):
    made, J = make(faces, name), gramian_or_matrix(name)
    assert repr(made.projector) == "QuadprogProjector(norm_eps=0.0, reg_eps=0.0001)"
    before = made(J)
    made.projector.reg_eps = 0.5
    changed = made(J)
    assert not torch.equal(changed, before)
    projector = pytest.importorskip("torchjd.linalg").QuadprogProjector(reg_eps=0.5)
    made.projector = projector
    assert made.projector is projector
    assert torch.equal(made(J), changed)
    theirs = make(jd, name)
    theirs.projector = projector
    assert torch.allclose(made(J), theirs(J), atol=1e-4)
    made.projector = None
    assert torch.equal(made(J), before)
    with pytest.raises(ValueError, match=r"projector is a int, expected one with reg_eps"):
        made.projector = 3
    with pytest.raises(AttributeError):  # nothing is cut here
        made.projector.norm_eps = 0.1


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_jac_to_grad_returns_weights_where_the_originals_does(name, optimised, on):
    def run(module) -> tuple[Tensor | None, Tensor] | str:
        J = matrix()
        torch.manual_seed(2)
        p, q = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(7))
        p.jac, q.jac = J[:, 0], J[:, 1:]
        with accelerate() if on else contextlib.nullcontext():
            try:
                weights = autojac.jac_to_grad([p, q], make(module, name), optimize_gramian_computation=optimised)
            except ValueError as error:
                return str(error)
        return weights, torch.cat([p.grad[None], q.grad])

    theirs, ours = run(jd), run(faces)
    if isinstance(theirs, str):
        assert ours == theirs
        return
    assert (ours[0] is None) == (theirs[0] is None)
    if ours[0] is not None:
        assert ours[0].dtype == theirs[0].dtype
        assert torch.allclose(ours[0] @ matrix(), ours[1], atol=1e-5)
    if name not in ("PCGrad", "GradVac", "Random", "NashMTL"):  # draw otherwise; NashMTL is solved further
        assert torch.allclose(ours[1], theirs[1], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_attributes_and_base_classes(name):
    ours, theirs = make(faces, name), make(jd, name)
    for part in ("weighting", "gramian_weighting"):
        assert hasattr(ours, part) == hasattr(theirs, part)
        if hasattr(theirs, part):
            assert isinstance(getattr(ours, part), nn.Module)
            with pytest.raises(AttributeError):
                setattr(ours, part, faces.MeanWeighting())
    for base in (jd.Aggregator, jd.WeightedAggregator, jd.GramianWeightedAggregator):
        assert isinstance(ours, base) == isinstance(theirs, base), base
    if hasattr(theirs, "gramian_weighting"):
        J = matrix()
        assert ours.gramian_weighting is ours.gramian_weighting
        for key in settings(name):
            value = KEPT.get((name, key), OTHER.get(key))
            if value is not None:
                setattr(ours.gramian_weighting, key, value)
                assert getattr(ours, key) is getattr(ours.gramian_weighting, key)
        if name not in ("PCGrad", "GradVac", "Krum", "PCD"):
            assert torch.allclose(ours.weighting(J) @ J, ours(J), atol=1e-5)
            assert torch.allclose(ours.gramian_weighting(J @ J.T) @ J, ours(J), atol=1e-3)
    assert not ours.state_dict().keys() & {"weighting", "gramian_weighting"}


@pytest.mark.parametrize("name", ["UPGrad", "AlignedMTL", "DualProj"])
def test_the_preferences_have_a_weighting(name):
    ours = make(faces, name)
    assert isinstance(ours.gramian_weighting.weighting, faces.MeanWeighting)
    ours.pref_vector = OTHER["pref_vector"]
    assert isinstance(ours.gramian_weighting.weighting, faces.ConstantWeighting)
    assert torch.equal(ours.gramian_weighting.weighting.weights.float(), OTHER["pref_vector"])


def test_hooks_run_and_change_the_direction():
    seen: list[str] = []
    made, J = faces.UPGrad(), matrix()
    plain = made(J)
    made.gramian_weighting.register_forward_hook(lambda m, given, out: seen.append(str(given[0].dtype)) or 2 * out)
    made.weighting.register_forward_hook(lambda m, given, out: seen.append(str(tuple(given[0].shape))))
    assert torch.allclose(made(J), 2 * plain, atol=1e-5)
    assert seen == ["torch.float32", "(3, 8)"]


@pytest.mark.parametrize("name", ["Mean", "Sum", "Random", "Constant"])
def test_weightings_that_count_rows(name):
    ours, theirs = make(faces, f"{name}Weighting"), make(jd, f"{name}Weighting")
    for given in (torch.zeros(3, 5), torch.zeros(3), torch.zeros(3, 4, 2), torch.eye(3, dtype=torch.float64)):
        assert ours(given).shape == theirs(given).shape == (3,)
        if name != "Random":
            assert torch.allclose(ours(given).float(), theirs(given).float())
    if name == "Mean":
        with pytest.raises(ValueError, match=r"MeanWeighting: matrix has shape \[0, 3\], expected at least one row"):
            ours(torch.zeros(0, 3))
    elif name != "Constant":
        assert ours(torch.zeros(0, 3)).shape == theirs(torch.zeros(0, 3)).shape
    with pytest.raises(ValueError, match="expected"):
        ours(torch.tensor(1.0))


@pytest.mark.parametrize("shape", [(3,), (3, 4), ()])
def test_a_gramian_is_square(shape):
    with pytest.raises(ValueError, match=rf"UPGradWeighting: gramian has shape \[{', '.join(map(str, shape))}\]"):
        faces.UPGradWeighting()(torch.zeros(shape))


def test_in_torchjds_own_compositions():
    J = matrix()
    mixed = jd.GramianWeightedAggregator(faces.CRMOGMWeighting(faces.UPGradWeighting()))
    theirs = jd.GramianWeightedAggregator(jd.CRMOGMWeighting(jd.UPGradWeighting()))
    for _ in range(2):
        assert torch.allclose(mixed(J), theirs(J), atol=1e-4)
    stateful = jd.CRMOGMWeighting(faces.GradVacWeighting())
    stateful(J @ J.T)
    stateful.reset()
    assert stateful.weighting.aggregator.state is None


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda made: pickle.loads(pickle.dumps(made))}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("name", [*AGGREGATORS, *WEIGHTINGS])
def test_copies_go_on(name, copied):
    made, given = make(faces, name), gramian_or_matrix(name)
    for part in ("weighting", "gramian_weighting"):
        getattr(made, part, None)  # made before
    torch.manual_seed(0)
    made(given)
    again = COPIES[copied](made)
    other = copy.deepcopy(made) if copied == "copy" else made  # a shallow copy shares its buffers
    torch.manual_seed(1)
    wanted = other(given)
    torch.manual_seed(1)
    assert torch.equal(again(given), wanted)
    if hasattr(made, "gramian_weighting"):
        assert again.gramian_weighting.aggregator is again
    for key in settings(name):
        if not isinstance(KEPT.get((name.removesuffix("Weighting"), key), OTHER.get(key, "x")), str):
            before = getattr(made, key)
            setattr(again, key, KEPT.get((name.removesuffix("Weighting"), key), OTHER.get(key)))
            if not (copied == "copy" and (name in WEIGHTINGS or isinstance(before, Tensor) or key in ("pref_vector",))):
                assert getattr(made, key) is before


@pytest.mark.parametrize("name", AGGREGATORS)
def test_faces_train_with_backward(name):
    p = nn.Parameter(torch.ones(4))
    mtlfast.backward([p.sum(), p.square().sum(), -p[0]], make(faces, name), shared=[p])
    assert p.grad.isfinite().all()

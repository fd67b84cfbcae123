"""The one table of Gram aggregators: how each is made and what it promises. Tests run over its rows."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtlfast.aggregation import (
    CRMOGM,
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ClipNorm,
    Compose,
    ConFIG,
    Constant,
    CrossNorm,
    DualProj,
    FairGrad,
    GradVac,
    GramAggregator,
    InverseNorm,
    Krum,
    Mean,
    MetaBalance,
    MoDo,
    NashMTL,
    NormBalance,
    PCGrad,
    Random,
    SDMGrad,
    Sum,
    UPGrad,
)

EQUIVARIANT = "the same direction for the tasks in another order"
SCALE_FREE = "the same weights when all gradients are multiplied by a constant"
LINEAR = "linear in each gradient's own length"
NON_CONFLICT = "no task's gradient has a negative product with the direction"
STATIONARY = "zero where a positive combination of the gradients is zero"


@dataclass(frozen=True)
class Method:
    """A row of the table."""

    make: Callable[[], GramAggregator]
    promises: frozenset[str] = frozenset()
    least_tasks: int = 1
    most_tasks: int = 1000
    any_tasks: bool = True  # False: it is made for three tasks
    always: bool = True  # False: it has no solution if a combination of the gradients is zero, and counts such steps
    cross: bool = False  # reads two batches' products
    tolerance: float = 1e-8  # to the twin, of the largest weight


def promising(*promises: str) -> frozenset[str]:
    return frozenset({SCALE_FREE, *promises})


METHODS = {
    "Sum": Method(Sum, promising(EQUIVARIANT, LINEAR)),
    "Mean": Method(Mean, promising(EQUIVARIANT, LINEAR)),
    "Constant": Method(lambda: Constant(torch.tensor([0.5, 2.0, -1.0])), promising(LINEAR), any_tasks=False),
    "Random": Method(Random, promising()),
    "PCGrad": Method(PCGrad, promising()),
    "PCGrad, mean, fixed": Method(lambda: PCGrad(reduction="mean", order="fixed"), promising(LINEAR)),
    "PCGrad, protecting": Method(lambda: PCGrad(order="fixed", protected=[3, 1]), promising(LINEAR), least_tasks=4),
    "GradVac": Method(GradVac, promising()),
    "GradVac, fixed": Method(lambda: GradVac(beta=0.3, order="fixed"), promising(LINEAR)),
    "MGDA": Method(MGDA, promising(EQUIVARIANT, NON_CONFLICT, STATIONARY)),
    "MGDA, Frank-Wolfe": Method(lambda: MGDA(epsilon=1e-3), promising(EQUIVARIANT)),
    "MGDA, l2": Method(lambda: MGDA(norms="l2"), promising(EQUIVARIANT)),
    "MGDA, loss+": Method(lambda: MGDA(norms="loss+"), promising()),
    "MGDA, least weights": Method(lambda: MGDA(min_weights=1e-3), promising(EQUIVARIANT)),
    "MGDA, least weights of each": Method(
        lambda: MGDA(min_weights=[0.1, 0.0, 0.3], norms="l2"), promising(), any_tasks=False
    ),
    "CAGrad": Method(lambda: CAGrad(0.5), promising(EQUIVARIANT)),
    "CAGrad, c = 2": Method(lambda: CAGrad(2.0, rescale=1), promising(EQUIVARIANT, NON_CONFLICT, STATIONARY)),
    "CAGrad, clipped": Method(lambda: CAGrad(0.5, clip=True), promising(EQUIVARIANT)),
    "CAGrad, preferring": Method(lambda: CAGrad(0.5, pref_vector=[0.2, 0.5, 0.3]), promising(), any_tasks=False),
    "CAGrad, clipped, preferring": Method(
        lambda: CAGrad(0.7, pref_vector=[0.2, 0.5, 0.3], clip=True), promising(), any_tasks=False
    ),
    "UPGrad": Method(UPGrad, promising(EQUIVARIANT)),
    "UPGrad, exact": Method(
        lambda: UPGrad(reg_eps=0.0), promising(EQUIVARIANT, LINEAR, NON_CONFLICT, STATIONARY), tolerance=1e-6
    ),
    "UPGrad, preferring": Method(lambda: UPGrad(torch.tensor([0.2, 0.5, 0.3])), promising(), any_tasks=False),
    "DualProj": Method(DualProj, promising(EQUIVARIANT)),
    "DualProj, exact": Method(
        lambda: DualProj(reg_eps=0.0), promising(EQUIVARIANT, NON_CONFLICT, STATIONARY), tolerance=1e-6
    ),
    "PCD": Method(PCD, promising()),
    "PCD, shares": Method(lambda: PCD(tau=torch.tensor([0.0, 0.1]), beta=0.9), promising(), any_tasks=False),
    "Krum": Method(lambda: Krum(1), promising(EQUIVARIANT), least_tasks=4),
    "Multi-Krum": Method(lambda: Krum(0, n_selected=3), promising(EQUIVARIANT), least_tasks=3),
    "AlignedMTL": Method(AlignedMTL, promising(EQUIVARIANT)),
    "AlignedMTL, median": Method(lambda: AlignedMTL(scale_mode="median"), promising(EQUIVARIANT)),
    "AlignedMTL, rmse, preferring": Method(
        lambda: AlignedMTL(torch.tensor([0.2, 0.5, 0.3]), "rmse"), promising(), any_tasks=False
    ),
    "IMTLG": Method(IMTLG, promising(EQUIVARIANT)),
    "ConFIG": Method(ConFIG, promising(EQUIVARIANT, LINEAR)),
    "ConFIG, preferring": Method(lambda: ConFIG(torch.tensor([0.2, 0.5, 0.3])), promising(LINEAR), any_tasks=False),
    **{
        f"ConFIG, {length}": Method(lambda length=length: ConFIG(length=length), promising(EQUIVARIANT))
        for length in ("mean", "geometric", "harmonic", "min", "max", "median")
    },
    "ConFIG, as the first": Method(lambda: ConFIG(length=0), promising()),
    "NashMTL": Method(NashMTL, frozenset({EQUIVARIANT, NON_CONFLICT, STATIONARY}), always=False),
    "NashMTL, any length": Method(lambda: NashMTL(max_norm=0.0), frozenset({EQUIVARIANT}), always=False),
    "NashMTL, preferring": Method(
        lambda: NashMTL(pref_vector=torch.tensor([0.2, 0.5, 0.3])),
        frozenset({NON_CONFLICT, STATIONARY}),
        any_tasks=False,
        always=False,
    ),
    "NashMTL, every other step": Method(lambda: NashMTL(update_weights_every=2), always=False),
    **{
        f"FairGrad, {alpha:g}": Method(
            lambda alpha=alpha: FairGrad(alpha), frozenset({EQUIVARIANT, NON_CONFLICT, STATIONARY}), always=False
        )
        for alpha in (0.5, 1.0, 2.0)
    },
    **{
        f"NormBalance, {target}": Method(lambda target=target: NormBalance(target), promising(EQUIVARIANT))
        for target in ("mean", "geometric", "harmonic", "min", "max", "median")
    },
    "NormBalance, as the first": Method(lambda: NormBalance(0), promising()),
    "ClipNorm": Method(ClipNorm, promising(EQUIVARIANT)),
    "ClipNorm, 2": Method(lambda: ClipNorm(2.0), frozenset({EQUIVARIANT})),
    "CrossNorm": Method(CrossNorm, promising(EQUIVARIANT), least_tasks=2, most_tasks=2),
    "InverseNorm": Method(InverseNorm, promising(EQUIVARIANT)),
    "MetaBalance": Method(MetaBalance, promising()),
    "MetaBalance, the last": Method(lambda: MetaBalance(relax=1.0, main_task=2), promising(), least_tasks=3),
    "Compose": Method(lambda: Compose(NormBalance("min"), MGDA()), promising(EQUIVARIANT, NON_CONFLICT)),
    "CRMOGM": Method(lambda: CRMOGM(MGDA()), promising(EQUIVARIANT, NON_CONFLICT)),
    "MoDo": Method(MoDo, cross=True),
    "SDMGrad": Method(SDMGrad, promising(), cross=True),
}


def numbers_of_tasks(method: Method, *wanted: int) -> list[int]:
    """The numbers of tasks among `wanted` that the method takes."""
    if not method.any_tasks:
        return [3]
    fitting = [K for K in wanted if method.least_tasks <= K <= method.most_tasks]
    return fitting or ([method.most_tasks] if min(wanted) > method.most_tasks else [])


def products(method: Method, J: Tensor) -> Tensor:
    """The Gram matrices of Jacobians [..., K, P], or the cross-Gram matrices of two batches."""
    return J @ (J + 0.5 * torch.randn_like(J)).mT if method.cross else J @ J.mT


def losses(num_tasks: int, device: str = "cpu") -> Tensor:
    """The tasks' losses, which are positive and all different."""
    return torch.linspace(0.5, 2, num_tasks, dtype=torch.float64, device=device)


def weigh(aggregator: GramAggregator, gram: Tensor, seed: int = 0, **context) -> Tensor:
    """The weights of one call, whose random numbers come from `seed`."""
    torch.manual_seed(seed)
    return aggregator.weights(gram, losses=losses(gram.shape[-1], gram.device), **context)

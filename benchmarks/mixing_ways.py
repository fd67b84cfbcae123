"""The contestants of bench_mixing.py: steps of K tasks that are mixtures of the losses of S samples."""

import torch
import torchjd.aggregation
from contestant import Backward, Contestant, autogram
from jacobian_trunks import TrunkSize, mlp_size, transformer_size
from step_ways import BARE, PLAIN, Model, Passes
from torch import Tensor

import mtlfast
from mtlfast.aggregation import MGDA, Aggregator, UPGrad
from mtlfast.bench.peers import torchjd_backward

TRUNKS = {
    "transformer-8x16": transformer_size(512, 4, batch=8, length=16),
    "transformer-16x32": transformer_size(512, 4, batch=16, length=32),
    "transformer-32x64": transformer_size(512, 4, batch=32, length=64),
    "mlp-64": mlp_size(1024, 6, batch=64),
    "mlp-256": mlp_size(1024, 6, batch=256),
}
QUICK = {"tiny-transformer": transformer_size(48, 1, batch=4, length=4)}
EACH_SAMPLE = 0  # in place of K: each sample is a task, A = I

# With a dense A: what `mixing=` chooses, one backward pass whether it pays or not, and K backward passes.
AUTO, FORCED, STORED = "mixing, dense", "mixing, dense, forced", "stored, dense"
DISJOINT = "mixing, disjoint"  # with one task for each sample, as `mixing=` chooses
TORCHJD = "TorchJD mtl_backward"  # its default: all passes at once
METHODS = {"UPGrad": UPGrad, "MGDA": MGDA}
OURS, THEIRS = "mixing, A = I, ", "TorchJD autogram, A = I, "  # and the method


def ways(num_tasks: int, size: TrunkSize, passes: Passes) -> dict[str, Contestant]:
    """The contestants by name.

    Args:
        num_tasks: K, or `EACH_SAMPLE`.
        size: of the model and of a batch.
        passes: where forward passes are counted.
    """
    model = Model(1, size, passes)
    backwards: dict[str, Backward] = {PLAIN: lambda features, losses: losses.mean().backward()}
    if num_tasks == EACH_SAMPLE:
        samples = torch.arange(size.shape[0])
        for method, aggregator in METHODS.items():
            backwards[OURS + method] = _mixing(model, samples, "auto", aggregator())
    else:
        backwards |= _of_tasks(num_tasks, size.shape[0], model)
    contestants = {name: Contestant(model, backward, model.per_sample) for name, backward in backwards.items()}
    if num_tasks == EACH_SAMPLE:  # TorchJD's engine hooks into its modules, and so has models of its own
        for method in METHODS:
            hooked = Model(1, size, passes)
            contestants[THEIRS + method] = Contestant(
                hooked, autogram(hooked, f"{method}Weighting", 0), hooked.per_sample
            )
    return contestants


def _of_tasks(num_tasks: int, samples: int, model: Model) -> dict[str, Backward]:
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(num_tasks, samples, generator=generator) / samples
    disjoint = torch.arange(samples) % num_tasks
    theirs, parameters = torchjd.aggregation.UPGrad(), list(model.trunk.parameters())

    def torchjd_default(features: Tensor, losses: Tensor) -> None:
        torchjd_backward(list(dense @ losses), features, parameters, theirs, optimize=False, retain_graph=True)

    return {
        BARE: lambda features, losses: model.bare(list(dense @ losses)),
        STORED: _mixing(model, dense, "stored", UPGrad()),
        AUTO: _mixing(model, dense, "auto", UPGrad()),
        FORCED: _mixing(model, dense, "mixing", UPGrad()),
        DISJOINT: _mixing(model, disjoint, "auto", UPGrad()),
        TORCHJD: torchjd_default,
    }


def _mixing(model: Model, A: Tensor, jacobian: str, aggregator: Aggregator) -> Backward:
    trunk = model.trunk
    return lambda features, losses: mtlfast.backward(losses, aggregator, shared=trunk, mixing=A, jacobian=jacobian)

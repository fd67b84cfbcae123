"""The K x K solvers: inside the op, with Python around them, and beside TorchJD on the same Gram matrix."""

from collections.abc import Callable
from typing import Any

import torch

from mtlfast import aggregation, ops
from mtlfast.aggregation import Step
from mtlfast.aggregation._solved import SolvedAggregator
from mtlfast.bench import peers
from mtlfast.bench.section import Section
from mtlfast.bench.timing import take_turns

TASKS = (2, 8, 40, 128)
REPEATS = 50  # solves in one timing inside the op, so that one call's Python does not count
CALLS = 20  # of Python in one timing: what takes microseconds is timed warm, as a training loop's next group finds it

FROM_THE_JACOBIAN = ("ConFIG", "NashMTL")  # TorchJD's take J [K, P], here with P = 2 K: their own Gram matrix is cheap

# Method -> how it is made, and TorchJD's weighting of the same problem, by its name and arguments.
METHODS: dict[str, tuple[Callable[[], SolvedAggregator], str, dict[str, Any]]] = {
    "PCGrad": (aggregation.PCGrad, "PCGradWeighting", {}),
    "GradVac": (aggregation.GradVac, "GradVacWeighting", {}),
    "MGDA": (aggregation.MGDA, "MGDAWeighting", {}),
    "CAGrad": (lambda: aggregation.CAGrad(0.5), "CAGradWeighting", {"c": 0.5}),
    "UPGrad": (aggregation.UPGrad, "UPGradWeighting", {}),
    "DualProj": (aggregation.DualProj, "DualProjWeighting", {}),
    "PCD": (aggregation.PCD, "PCDWeighting", {}),
    "Krum": (lambda: aggregation.Krum(0), "KrumWeighting", {"n_byzantine": 0}),
    "AlignedMTL": (aggregation.AlignedMTL, "AlignedMTLWeighting", {}),
    "IMTLG": (aggregation.IMTLG, "IMTLGWeighting", {}),
    "ConFIG": (aggregation.ConFIG, "ConFIG", {}),
    "NashMTL": (aggregation.NashMTL, "NashMTL", {}),
    "FairGrad, 1": (lambda: aggregation.FairGrad(1.0), "FairGradWeighting", {"alpha": 1.0}),
    "FairGrad, 2": (lambda: aggregation.FairGrad(2.0), "FairGradWeighting", {"alpha": 2.0}),
    "MoDo": (aggregation.MoDo, "MoDoWeighting", {}),
    "SDMGrad": (aggregation.SDMGrad, "SDMGradWeighting", {}),
}


def methods_for(num_tasks: int) -> list[str]:
    """The methods that work with so many tasks.

    Args:
        num_tasks: K.
    """
    return [method for method in METHODS if method != "Krum" or num_tasks > 2]


def measure(rounds: int, tasks: tuple[int, ...] = TASKS) -> Section:
    """Times every method.

    Args:
        rounds: alternating rounds.
        tasks: the numbers of tasks.
    """
    section = Section(
        "solves",
        "Weights from a Gram matrix",
        "On one thread. In the op: of 50 matrices in one call, so without Python. weights(): the aggregator's method, "
        "on one matrix. TorchJD: its weighting on the same matrix, to its own default precision. Times faster: "
        "weights() than TorchJD.",
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        section.rows = [_row(method, K, rounds) for method in METHODS for K in tasks if method in methods_for(K)]
    finally:
        torch.set_num_threads(threads)
    return section


def _row(method: str, num_tasks: int, rounds: int) -> dict[str, Any]:
    make, rival, arguments = METHODS[method]
    J = torch.randn(REPEATS, num_tasks, 2 * num_tasks, dtype=torch.float64)
    gram, ours = J @ J.mT, make()
    arguments_of_op = make().solve_arguments(gram, Step(num_tasks))
    calls = CALLS if num_tasks < 100 and method != "NashMTL" else 1  # there TorchJD takes up to a second
    turns: dict[str, Callable[[], object]] = {
        "op": lambda: ops.solve(*arguments_of_op),
        "weights": lambda: [ours.weights(gram[0]) for _ in range(calls)],
    }
    if peers.installed():
        import torchjd.aggregation

        if rival == "NashMTL":
            arguments = {"n_tasks": num_tasks}
        theirs = getattr(torchjd.aggregation, rival)(**arguments)
        given = J[0] if rival in FROM_THE_JACOBIAN else gram[0]
        turns["TorchJD"] = lambda: [theirs(given) for _ in range(calls)]
    times = take_turns(turns, rounds if num_tasks < 100 else 1)
    row: dict[str, Any] = {
        "method": method,
        "K": num_tasks,
        "in the op, us": times["op"].median * 1e6 / REPEATS,
        "weights(), us": times["weights"].median * 1e6 / calls,
    }
    if "TorchJD" in times:
        row["TorchJD, us"] = times["TorchJD"].median * 1e6 / calls
        row["times faster"] = list(times["TorchJD"].ratio_to(times["weights"]))
    return row

"""Runs programs on several ranks, each in a process of its own, with gloo on this machine."""

from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import distributed

PRELOADED = ["torch.distributed.tensor.parallel", "torch.distributed.fsdp", "mtlfast"]  # takes seconds, so only once
TIMEOUT = timedelta(seconds=90)  # of a collective: no test waits longer for a rank that fails


def on_ranks(
    number: int, program: Callable[..., Any], *arguments: Any, timeout: timedelta = TIMEOUT, collect: bool = True
) -> list[Any]:
    """What the program returns on each rank.

    Args:
        number: of ranks.
        program: a function of a module, which is called with the rank, the number of ranks and the arguments.
        arguments: what can be pickled.
        timeout: of a collective.
        collect: whether the program returns. If not, it ends its process itself, and the list is empty.
    """
    with TemporaryDirectory() as folder:
        get_context("forkserver").set_forkserver_preload(PRELOADED)
        of_rank = (number, folder, timeout, program, arguments)
        mp.start_processes(_run, of_rank, nprocs=number, start_method="forkserver")
        ranks = range(number) if collect else ()
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in ranks]


def _run(rank: int, number: int, folder: str, timeout: timedelta, program: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    address = f"file://{folder}/rendezvous"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=number, timeout=timeout)
    torch.save(program(rank, number, *arguments), Path(folder, f"result{rank}"))
    distributed.barrier()  # a rank that leaves early would end the collectives of the others
    distributed.destroy_process_group()

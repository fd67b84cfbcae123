"""Each op on scattered task gradients, beside the plain-PyTorch way; `python -m mtlfast bench` shows them as ratios."""

import pytest
from conftest import TASKS, WAYS, workload

from mtlfast.bench.contests import PASSES, contests_on


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_tasks", TASKS)
@pytest.mark.parametrize("op", PASSES)
def bench_op(benchmark, op, num_tasks, way):
    benchmark.group = f"{op}, K = {num_tasks}"
    contest = contests_on(workload(num_tasks))[op]
    benchmark.pedantic(contest.native if way == "mtlfast" else contest.plain, rounds=5, warmup_rounds=1)

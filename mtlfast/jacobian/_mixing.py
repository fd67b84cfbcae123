"""K tasks that are mixtures of the losses of S samples: one backward pass holds all of their gradients."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtlfast import _grad
from mtlfast._arguments import Columns
from mtlfast._losses import Present
from mtlfast.jacobian._certificate import certify
from mtlfast.jacobian._computed import ComputedJacobian
from mtlfast.jacobian._known_nodes import why_unreadable
from mtlfast.jacobian._mixed import MixedPart
from mtlfast.jacobian._moves import fingerprint, moves_by_values
from mtlfast.jacobian._overwriting import COMPILED
from mtlfast.jacobian._plan import LayerPlan, Plan
from mtlfast.jacobian._probe import PROBES, Maps, NotMixed, probed, recall
from mtlfast.jacobian._sample_costs import cost_of_gram, rows_in
from mtlfast.jacobian._sample_products import SampleLayer, factors_of
from mtlfast.jacobian._sample_uses import SampleUse, is_packed, kept_by, sample_uses, widened
from mtlfast.jacobian._samples import Samples
from mtlfast.jacobian._streamed import StreamedPart
from mtlfast.jacobian._uses import MOST_NODES, Graph, walk


class MixingJacobian(ComputedJacobian):
    """The Jacobian of K mixtures of samples' losses, from one backward pass of the sum of these.

    Args:
        present: the K tasks with their losses, A times those of the samples.
        shared: as in `StoredJacobian`, and so are `retain_graph` and `loss_weights_later`.
        per_sample: [S] the losses of the samples.
        samples: A.
        way: "auto" or "mixing".
        memory_budget: the most bytes that the rows of layers may take. None: they all wait for the weights. If they do
            not fit, there are several passes for some of the layers each, and one more for the weighted sum.

    Raises:
        NotMixed: the samples' gradients cannot be told apart.
    """

    way = "mixing"

    def __init__(
        self,
        present: Present,
        shared: Columns | None,
        retain_graph: bool,
        loss_weights_later: bool,
        storage_dtype: torch.dtype | None,
        per_sample: Tensor,
        samples: Samples,
        way: str,
        memory_budget: int | None,
    ) -> None:
        super().__init__(present, shared, retain_graph, loss_weights_later, storage_dtype)
        self._budget = memory_budget
        self._per_sample, self._samples, self._later = per_sample, samples, loss_weights_later
        graph = walk([per_sample])
        if self._checks and graph.nodes:
            self.coarsest = graph.coarsest()
        self._uses = self._classified(graph)
        moving = moves_by_values(graph.nodes, samples.number)
        if way == "auto":
            self._check_cost(moving)
        self._check_budget()
        key = (samples.number, tuple(graph.leaves.get(id(p)) for p in self.parameters), fingerprint(graph))
        self._remembered = recall(self.parameters[0], key, self._probe, way == "mixing", moving)
        self._wide = self._remembered.wide[samples.num_tasks, samples.task is None]
        self._wide.settle()
        self._absent: frozenset[int] = frozenset()
        self._plain_gradients: Sequence[Tensor | None] | None = None

    @property
    def no_rows(self) -> str | None:
        return 'jacobian="mixing" does not make them, expected jacobian="stored"'

    @property
    def plan(self) -> Plan:
        layers = []
        for t, (name, uses) in enumerate(zip(self._names, self._uses, strict=True)):
            rows = [rows_in(use) for use in uses if use.form != "sum"]
            flops = ordinary = None
            if rows:
                one = 2 * sum(rows_in(use) * use.numel for use in uses)
                ordinary = self.num_tasks * one
                flops = int(2 * sum(cost_of_gram(self._samples, use) for use in uses)) + one
            layers.append(LayerPlan(name, "mixing", _forms(uses), sum(rows) or None, flops, ordinary, self._kept(t)))
        passes = len(self._blocks())
        passes_of = f"{passes} backward pass{'es' if passes > 1 else ''}"
        reason = f"{passes_of} for {self._samples.number} samples in place of {self.num_tasks} for tasks"
        return Plan(self.way, reason, layers=tuple(layers))

    def _blocks(self) -> list[list[int]]:
        """The places of the shared parameters, in blocks whose rows keep to the budget."""
        everything = list(range(len(self.parameters)))
        if self._budget is None:
            return [everything]
        blocks: list[list[int]] = []
        size = 0
        for t in everything:
            own = self._kept(t)
            if not blocks or size + own > self._budget:
                blocks.append([])
                size = 0
            blocks[-1].append(t)
            size += own
        return blocks

    def _classified(self, graph: Graph) -> list[list[SampleUse]]:
        """The uses of every shared parameter."""
        if (why := why_unreadable()) is not None:
            raise NotMixed(why)
        if not graph.nodes:
            raise NotMixed(f"the graph has more than {MOST_NODES} nodes")
        if graph.hooked or any(leaf._backward_hooks for leaf in self._reached.leaves):
            raise NotMixed("the model has hooks, which would see the gradients of all samples at once")
        if any(type(node).__name__ == COMPILED for node in graph.nodes):
            raise NotMixed("a part of the model is compiled by torch.compile")
        if self.storage_dtype is not None:
            raise NotMixed("storage_dtype= needs the gradients")
        found = []
        for name, parameter in zip(self._names, self.parameters, strict=True):
            uses = sample_uses(parameter, graph, self._samples.number)
            if isinstance(uses, str):
                raise NotMixed(f"{name}: {uses}")
            if any(is_packed(use) for use in uses):
                raise NotMixed(f"{name}: what it multiplies is not kept, as in activation checkpointing")
            if len({use.form == "sum" for use in uses}) > 1:
                raise NotMixed(f"{name}: it is used in two forms")
            found.append(uses)
        return found

    def _check_cost(self, probes: bool) -> None:
        """Raises unless one pass with products over samples is predicted to take less time than K passes.

        Args:
            probes: whether each step is probed.
        """
        K = self._samples.num_tasks
        blocks = len(self._blocks())
        passes = 2 if blocks == 1 else blocks + 2  # input gradients for each block, and an ordinary pass
        passes += 1 + PROBES if probes else 0
        ordinary = mixed = 0.0
        for uses in self._uses:
            for use in uses:
                if use.form != "sum":
                    one = rows_in(use) * use.numel
                    ordinary += K * 2 * one
                    mixed += passes * one + cost_of_gram(self._samples, use)
        if K < 2:
            raise NotMixed("there is one task")
        if mixed > ordinary:
            raise NotMixed(f"{K} passes take fewer FLOPs")

    def _check_budget(self) -> None:
        """Raises if the rows of one parameter are more than the budget."""
        if self._budget is None:
            return
        most = max(self._kept(t) for t in range(len(self.parameters)))
        if most > self._budget:
            raise NotMixed(f"memory_budget is {self._budget} bytes, expected at least {most}, which one layer takes")

    def _kept(self, t: int) -> int:
        """The bytes that a parameter's rows take, and the samples' gradients of one of whose parts there are sums."""
        outputs = [use.node._input_metadata[0] for use in self._uses[t]]
        rows: int = sum(math.prod(output.shape) * output.dtype.itemsize for output in outputs)
        if not any(use.form == "sum" for use in self._uses[t]) or not widened(self._uses[t]):
            return rows
        size: int = outputs[0].dtype.itemsize
        return rows + self._samples.number * self.parameters[t].numel() * size

    def _probe(self, seed: int) -> tuple[Maps, bool]:
        everything = range(len(self.parameters))
        used = list(zip(self._names, self.parameters, self._uses, strict=True))
        return probed(used, lambda factors: list(self._sweep(factors, True, everything)), self._samples.number, seed)

    def _sweep(self, cotangent: Tensor, retain_graph: bool, columns: Sequence[int]) -> Iterator[Tensor | None]:
        """The gradients at the outputs of the columns' uses, for samples' losses multiplied by the cotangent."""
        factors = cotangent.to(self._per_sample.device, self._per_sample.dtype)
        edges = [GradientEdge(use.node, 0) for t in columns for use in self._uses[t]]
        return iter(torch.autograd.grad(self._per_sample, edges, factors, retain_graph=retain_graph, allow_unused=True))

    def obtain(self, loss_weights: Tensor | None = None) -> None:
        """Runs the backward pass of the sum of all samples' losses, and before it that of the other leaves."""
        if loss_weights is not None:
            self._absent = frozenset(set(range(self.num_tasks)) - set(self._tasks_with_weight(loss_weights)))
            self._samples = self._samples.scaled(loss_weights)
        self._pass_weights = loss_weights
        keep = self._retain_graph or self._checks or (self._later and bool(self._others.leaves))
        if not self._later:
            self._plain_gradients = self._of_others(None, True)
        blocks = self._blocks()
        if len(blocks) == 1:
            self._compute(self._parts_of(blocks[0], keep), self._wide)
            return
        parts: list[MixedPart] = []
        for block in blocks:
            for part in self._parts_of(block, True):
                layers = [SampleLayer(self.parameters[t], t, ()) for t in part.places()]
                grams, wide = part.compute(), self._wide
                rest = (self._samples, self._absent, wide, part.dtype, grams, self._pass_of_samples)
                parts.append(StreamedPart(layers, *rest))
                del part
        self._compute(parts, self._wide)

    def _parts_of(self, columns: Sequence[int], retain_graph: bool) -> list[MixedPart]:
        """Runs the backward pass for some columns, and returns these."""
        kept = iter([kept_by(use) for t in columns for use in self._uses[t]])  # the pass may free them
        deltas = self._sweep(torch.ones(self._samples.number), retain_graph, columns)
        kinds: dict[object, list[SampleLayer]] = {}
        for t in columns:
            factors = [
                factors_of(use, rows, of_node, delta)
                for use, rows in zip(self._uses[t], self._remembered.maps[t], strict=True)
                if (of_node := next(kept)) is not None and (delta := next(deltas)) is not None
            ]
            if factors:
                layer = SampleLayer(self.parameters[t], t, factors)
                kinds.setdefault((layer.dtype, layer.parameter.device), []).append(layer)
        return [MixedPart(of, self._samples, self._absent, self._wide) for of in kinds.values()]

    def _pass_of_samples(self, weights: Tensor, parameters: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The gradients of parameters by one ordinary backward pass of the samples' weighted losses [S]."""
        factors = weights.to(self._per_sample.device, self._per_sample.dtype)
        with torch.enable_grad():
            return torch.autograd.grad(self._per_sample, parameters, factors, retain_graph=True, allow_unused=True)

    def _of_others(self, loss_weights: Tensor | None, retain_graph: bool) -> Sequence[Tensor | None]:
        """The plain gradients of the leaves that are not shared, for the sum of the tasks' losses."""
        if not self._others.leaves:
            return []
        ones = torch.ones(self.num_tasks, dtype=torch.float64, device=self._samples.factors.device)
        weights = ones if loss_weights is None else loss_weights.double().to(ones.device)
        cotangent = self._samples.weights(weights).to(self._per_sample.dtype)
        return torch.autograd.grad(
            self._per_sample, self._others.leaves, cotangent, retain_graph=retain_graph, allow_unused=True
        )

    def _plain(self, loss_weights: Tensor | None) -> _grad.Pending:
        before = self._plain_weights
        if before is not None:
            loss_weights = before if loss_weights is None else before * loss_weights
        gradients, self._plain_gradients = self._plain_gradients, None
        if gradients is None or loss_weights is not None:
            with torch.enable_grad():
                gradients = self._of_others(loss_weights, self._retain_graph)
        if gradients:
            self._others.collect(0, gradients)
        del gradients
        return self._others.prepared()

    def _certify(self, weights: Tensor) -> None:
        """Compares the update, and the products of two random tasks, with ordinary backward passes."""
        super()._certify(weights)
        pair = random.sample(range(self.num_tasks), min(2, self.num_tasks))
        for tasks in ([pair[0]], [pair[-1]], pair):
            unit = torch.zeros_like(weights)
            unit[..., tasks] = 1
            certify(self, unit, self._parts_computed())


def _forms(uses: Sequence[SampleUse]) -> str:
    names = sorted({use.form for use in uses})
    return ", ".join(names) if names else "no sample reaches it"

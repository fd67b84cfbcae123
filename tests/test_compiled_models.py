"""Models under torch.compile in every way, and surgery inside a compiled training step without a graph break."""

import copy
import shutil

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from ways import WAYS, step

import mtlfast
from mtlfast import TaskGradients, ops
from mtlfast.aggregation import NashMTL, PCGrad

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
NUM_TASKS = 3
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model() -> tuple[nn.Sequential, nn.ModuleList]:
    torch.manual_seed(3)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 5), nn.Tanh())
    return trunk, nn.ModuleList(nn.Linear(5, 1) for _ in range(NUM_TASKS))


def losses_of(trunk, heads, x: Tensor) -> list[Tensor]:
    features = trunk(x)
    return [(head(features) - k).square().mean() for k, head in enumerate(heads)]


def assert_same_gradients(one, other) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_compiled_trunk(way, dynamic):
    both = nn.ModuleList(model())
    eager = copy.deepcopy(both)
    with torch._functorch.config.patch(donated_buffer=False):
        compiled = torch.compile(both[0], backend="aot_eager", dynamic=dynamic)
        for x in torch.randn(2, 8, 4):
            step(way, compiled, both[1], x, PCGrad(order="fixed"))
            step(way, eager[0], eager[1], x, PCGrad(order="fixed"))
            assert_same_gradients(both, eager)


@pytest.mark.parametrize("way", ["losses", "closures", "accumulator"])
def test_a_whole_compiled_model(way):
    """It is one node of the graph, so that every loss reaches every parameter: `shared` says what is shared."""
    both = nn.ModuleList(model())
    eager, x = copy.deepcopy(both), torch.randn(8, 4)

    def backward(net, losses):
        if way == "closures":
            source = [lambda k=k: losses(*net, x)[k] for k in range(NUM_TASKS)]
        elif way == "losses":
            source = losses(*net, x)
        else:
            source = mtlfast.TaskGradientAccumulator(net[0])
            for part in x.chunk(2):
                source.add(losses(*net, part))
        mtlfast.backward(source, PCGrad(order="fixed"), shared=None if way == "accumulator" else net[0])

    with torch._functorch.config.patch(donated_buffer=False):
        backward(both, torch.compile(losses_of, backend="aot_eager"))
    backward(eager, losses_of)
    assert_same_gradients(both, eager)


def test_surgery_at_features_inside_of_a_compiled_function_is_refused():
    trunk, heads = model()

    @torch.compile(backend="aot_eager")
    def forward(x):
        features = trunk(x)
        return features, [head(features).square().mean() for head in heads]

    features, losses = forward(torch.randn(8, 4))
    with pytest.raises(ValueError, match="the losses reach none of the 1 features of at="):
        mtlfast.backward(losses, PCGrad(), at=features)


@pytest.mark.long
@needs_compiler
def test_a_trunk_that_inductor_compiled():
    from torch._inductor.utils import fresh_cache

    both = nn.ModuleList(model())
    eager, x = copy.deepcopy(both), torch.randn(8, 4)
    with fresh_cache(), torch._functorch.config.patch(donated_buffer=False):
        compiled = torch.compile(both[0])
        for way in ("losses", "at"):
            for net, trunk in ((both, compiled), (eager, eager[0])):
                net.zero_grad()
                step(way, trunk, net[1], x, PCGrad(order="fixed"))
            assert_same_gradients(both, eager)


def test_what_a_plain_backward_pass_compiled_is_good_for_one_pass():
    """Closures and `at` need each graph once. The others are refused before anything is written."""
    both = nn.ModuleList(model())
    x = torch.randn(8, 4)
    compiled = torch.compile(both[0], backend="aot_eager")
    sum(losses_of(compiled, both[1], x)).backward()
    before = [p.grad.clone() for p in both.parameters()]
    for way in ("losses", "features"):
        with pytest.raises(ValueError, match="donated_buffer = False"):
            step(way, compiled, both[1], x, PCGrad())
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(both.parameters(), before, strict=True))
    for way in ("closures", "at"):
        step(way, compiled, both[1], x, PCGrad())


@pytest.mark.long
@needs_compiler
def test_code_from_the_cache_that_overwrites_gives_no_wrong_gradients():
    """Torch's cache may return what an earlier program compiled with donated buffers, although they are off now."""
    from torch._inductor.utils import fresh_cache

    both = nn.ModuleList(model())
    eager, x = copy.deepcopy(both), torch.randn(8, 4)
    with fresh_cache():
        sum(losses_of(torch.compile(both[0]), both[1], x)).backward()
        torch._dynamo.reset()
        both.zero_grad()
        with torch._functorch.config.patch(donated_buffer=False):
            try:
                step("losses", torch.compile(both[0]), both[1], x, PCGrad(order="fixed"))
            except ValueError as error:
                refusal = str(error)
            else:  # a torch whose cache keeps the two apart
                refusal = None
                step("losses", *eager, x, PCGrad(order="fixed"))
    assert refusal is None or "has overwritten what the next task's pass reads" in refusal
    assert_same_gradients(both, eager)


@pytest.mark.parametrize("way", ["losses", "accumulator"])
@pytest.mark.parametrize("at", ["first pass", "last pass"])
def test_a_pass_that_overwrites_what_the_next_one_reads_is_refused(at, way):
    class CompiledFunction(torch.autograd.Function):  # its node is called as that of a compiled function
        passes = 0

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x.detach().clone())
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            CompiledFunction.passes += 1
            result = 2 * x * gradient
            if CompiledFunction.passes == (1 if at == "first pass" else NUM_TASKS):
                x.data.zero_()  # autograd does not see this
            return result

    w = nn.Parameter(torch.ones(2))
    y = CompiledFunction.apply(w)
    losses = [y.sum() * (k + 1) for k in range(NUM_TASKS)]
    accumulator = mtlfast.TaskGradientAccumulator([w])

    def run():
        if way == "losses":
            return mtlfast.backward(losses, PCGrad(), shared=[w])
        accumulator.add(losses)
        return mtlfast.backward(accumulator, PCGrad())

    if at == "last pass":
        run()
        torch.testing.assert_close(w.grad, torch.full((2,), 12.0))
        return
    with pytest.raises(ValueError, match="expected TORCHINDUCTOR_CACHE_DIR to name an empty directory"):
        run()
    assert w.grad is None


def surgery(rows, aggregator):
    grads = TaskGradients.from_rows(rows)
    gram = ops.gram(grads)
    by_hand = ops.combine(grads, ops.solve(gram, "pcgrad", [0.0, 0.0]))
    return [*by_hand, *ops.combine(grads, aggregator.weights(gram)), *aggregator(grads), gram]


def rows_of(*sizes: int, dtype=torch.float32) -> list[list[Tensor]]:
    return [[torch.randn(n, 7, dtype=dtype).T if n % 2 else torch.randn(n, dtype=dtype) for n in sizes] for _ in "abc"]


@pytest.mark.long
@pytest.mark.native
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
@pytest.mark.parametrize("dynamic", [None, True])
def test_surgery_in_a_compiled_function(dynamic, backend):
    """Without a graph break and with the bits of eager calls, also when the sizes change."""
    compiled = torch.compile(surgery, fullgraph=True, dynamic=dynamic, backend=backend)
    aggregator = PCGrad(order="fixed")
    for rows in (rows_of(5, 8, 130), rows_of(9, 6, 33)):
        eager = surgery(rows, aggregator)
        assert all(torch.equal(a, b) for a, b in zip(compiled(rows, aggregator), eager, strict=True))


@pytest.mark.native
def test_one_graph_serves_all_sizes():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(surgery, fullgraph=True, dynamic=True, backend=count)
    for rows in (rows_of(5, 8, 130), rows_of(9, 6, 34), rows_of(11, 10, 12)):
        compiled(rows, PCGrad(order="fixed"))
    assert len(graphs) == 1


@pytest.mark.native
@pytest.mark.parametrize("name", mtlfast.methods(4))
def test_every_method_in_a_compiled_function(name):
    """Methods with state and random orders too: the second step has a state behind it."""
    one, rows, losses = mtlfast.methods(4)[name](), [*rows_of(5, 8), *rows_of(5, 8)][:4], torch.rand(4) + 0.1
    other = copy.deepcopy(one)

    def direction(rows, losses):
        return one(TaskGradients.from_rows(rows), losses=losses)

    compiled = torch.compile(direction, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.manual_seed(1)
        traced = compiled(rows, losses)
        assert torch.is_grad_enabled()
        torch.manual_seed(1)
        eager = other(TaskGradients.from_rows(rows), losses=losses)
        assert all(torch.equal(a, b) for a, b in zip(traced, eager, strict=True))
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states if isinstance(a, Tensor))


@pytest.mark.native
@pytest.mark.parametrize(("how", "dynamic"), [("vjp", True), ("vjp", None), ("jacrev", None), ("grad", None)])
def test_a_whole_training_step_is_compiled(how, dynamic):
    """The forward pass, the task gradients, surgery and the update in one graph."""
    trunk, heads = model()
    params = {name: p.detach() for name, p in trunk.named_parameters()}
    aggregator, x = NashMTL(), torch.randn(8, 4)

    def losses(params, x):
        return torch.stack(losses_of(lambda x: torch.func.functional_call(trunk, params, (x,)), heads, x))

    def train(params, x, how=how):
        if how == "jacrev":
            grads = TaskGradients.from_stacked(list(torch.func.jacrev(losses)(params, x).values()))
        elif how == "vjp":
            _, pull = torch.func.vjp(lambda p: losses(p, x), params)
            grads = TaskGradients.from_rows([list(pull(one)[0].values()) for one in torch.eye(NUM_TASKS)])
        else:
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            of_tasks = losses(leaves, x).unbind()
            given = list(leaves.values())
            grads = TaskGradients.from_rows([torch.autograd.grad(loss, given, retain_graph=True) for loss in of_tasks])
        return {name: p - 0.1 * d for (name, p), d in zip(params.items(), aggregator(grads), strict=True)}

    wanted = train(params, x, "vjp")
    aggregator.reset()
    if how == "grad" and not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        pytest.skip("this torch does not trace torch.autograd.grad")
    with torch._dynamo.config.patch({"trace_autograd_ops": True} if how == "grad" else {}):
        got = torch.compile(train, fullgraph=True, dynamic=dynamic, backend="aot_eager")(params, x)
    for a, b in zip(got.values(), wanted.values(), strict=True):
        torch.testing.assert_close(a, b)

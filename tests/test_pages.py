"""README.md and docs/: every block of Python runs, every link leads somewhere, and the pages agree with the code.

The blocks of docs/recipes.md have tests of their own, in test_recipes.py. Those of docs/distributed.md run on two
ranks. Shell blocks are not run, because they install and build; what they name must be there.
"""

import re

import pytest
import torch
from pages import RECIPES, ROOT, SNIPPETS, Snippet, blocks, pages, prose, text_of
from ranked import on_ranks
from torch import Tensor, distributed, nn

import mtlfast
from mtlfast.bench.timing import Timing

if not pages():
    pytest.skip("needs the checkout", allow_module_level=True)
DISTRIBUTED = "docs/distributed.md"
RUN_HERE = [
    pytest.param(*snippet, id=": ".join(snippet)) for snippet in SNIPPETS if snippet[0] not in (RECIPES, DISTRIBUTED)
]


@pytest.mark.parametrize("page", pages())
def test_every_block_of_python_has_a_name_of_its_own(page):
    names = [name for name, _ in blocks(page)]
    assert all(names)
    assert len(set(names)) == len(names)
    # Fences that are indented, or of an unknown language, would be passed over.
    fences = re.findall(r"^ *```(.*)$", text_of(page), re.MULTILINE)
    assert {fence.split()[0] for fence in fences if fence} <= {"python", "sh"}
    assert fences.count("") * 2 == len(fences)


@pytest.mark.whole
@pytest.mark.parametrize(("page", "name"), RUN_HERE)
def test_a_block_runs(page, name):
    snippet = Snippet(page, name)
    needs = re.findall(r"^from (torchjd)", snippet.code, re.MULTILINE) + ["torchjd"] * (name == "accelerate")
    for package in needs:
        pytest.importorskip(package)
    try:
        snippet.run()
    finally:
        if name == "accelerate":
            mtlfast.compat.torchjd.restore()


class Engine:
    """Reduces in its own backward pass, as DeepSpeed's engine does."""

    def __init__(self, snippet: Snippet) -> None:
        self.optimizer, self.parameters = snippet.optimizer, [*snippet.trunk.parameters(), *snippet.heads.parameters()]

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        for parameter in self.parameters:
            distributed.all_reduce(parameter.grad)
            parameter.grad /= distributed.get_world_size()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def blocks_of_distributed(rank: int, ranks: int) -> dict[str, Tensor]:
    """All parameters after each block, and after three steps of the engine."""
    found = {}
    for page, name in SNIPPETS:
        if page == DISTRIBUTED:
            snippet = Snippet(page, name).run()
            if name == "zero":
                engine = Engine(snippet)
                for _ in range(3):
                    snippet.step(engine, snippet.data.chunk(ranks)[rank])
            parameters = [*snippet.trunk.parameters(), *snippet.heads.parameters()]
            whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]
            found[name] = torch.cat([p.detach().flatten() for p in whole])
    return found


def in_one_process(name: str) -> Tensor:
    """What a block of docs/distributed.md should come to, by one process on the samples of all ranks."""
    snippet = Snippet(RECIPES, "setup").run()
    parameters = [*snippet.trunk.parameters(), *snippet.heads.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.01) if name == "fsdp2" else snippet.optimizer
    aggregator = mtlfast.aggregation.PCGrad() if name == "ddp" else mtlfast.aggregation.UPGrad()
    for _ in range(3 if name == "zero" else 20):
        optimizer.zero_grad()
        mtlfast.backward(snippet.losses_of(snippet.data), aggregator, shared=snippet.trunk)
        optimizer.step()
    return snippet.parameters()


@pytest.mark.whole
def test_the_blocks_for_several_ranks_train_as_one_process():
    first, second = on_ranks(2, blocks_of_distributed)
    assert first.keys() == {name for page, name in SNIPPETS if page == DISTRIBUTED}
    for name, parameters in first.items():
        assert torch.equal(parameters, second[name])
        torch.testing.assert_close(parameters, in_one_process(name), rtol=1e-4, atol=1e-5, msg=name)


def test_the_call_does_what_the_loop_by_hand_does():
    gradients = []
    for name in ("by_hand", "one_call"):
        snippet = Snippet("README.md", name).run()
        parameters = [*snippet.trunk.parameters(), *snippet.heads.parameters()]
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
    torch.testing.assert_close(*gradients)


def test_the_program_of_the_readme_trains(capsys):
    losses = [loss.item() for loss in Snippet("README.md", "program").run().losses]
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("50: losses")
    assert last.startswith("200: losses")
    assert losses[0] < 0.1
    assert losses[1] < 2


def test_looking_tells_conflicts_and_lengths():
    snippet = Snippet("docs/choose.md", "look").run()
    assert snippet.conflicts.shape == (2, 2)
    assert torch.equal(snippet.conflicts, snippet.conflicts.T)
    assert (snippet.lengths > 0).all()


@pytest.mark.parametrize("name", ["weighting", "conflict", "part"])
def test_what_is_tried_first_trains(name):
    snippet = Snippet("docs/choose.md", name)
    before = snippet.loss()
    assert snippet.run().loss() < 0.9 * before


def test_surgery_on_a_part_leaves_the_rest_the_plain_gradient():
    part = Snippet("docs/choose.md", "part", ("range(20)", "range(1)")).run()
    plain = Snippet("docs/choose.md", "part", ("range(20)", "range(0)")).run()
    sum(plain.losses_of(plain.data)).backward()
    torch.testing.assert_close(part.trunk[0].weight.grad, plain.trunk[0].weight.grad)


def test_the_ten_lines_of_python_are_a_method():
    own = Snippet("docs/add-a-method.md", "own").run()
    assert torch.allclose(own.direction, torch.ones(2))
    trunk, head = nn.Linear(2, 2), nn.Linear(2, 1)
    features = trunk(torch.ones(3, 2))
    losses = [features.square().mean(), None, head(features).mean()]
    result = mtlfast.backward(losses, own.InverseNorms(), shared=trunk, diagnostics=True)
    assert torch.allclose(result.weights * result.norms, torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("page", pages())
def test_shell_blocks_name_what_is_there(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for _, code in blocks(page, "sh"):
        assert set(re.findall(r"\bmake ([\w-]+)", code)) <= targets
        for path in re.findall(r"\b(?:bash|python) ([\w/.]+\.(?:sh|py))\b", code):
            assert (ROOT / path).exists(), path


def anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages())
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.resolve().relative_to(ROOT).as_posix()), target


def test_the_index_has_every_page():
    linked = set(re.findall(r"\]\(([\w/-]+\.md)\)", text_of("docs/README.md")))
    assert {page.removeprefix("docs/") for page in pages() if page.startswith("docs/")} <= linked | {"README.md"}


def test_every_promise_names_tests_that_are_there():
    sections = re.split(r"^## ", text_of("docs/promises.md"), flags=re.MULTILINE)[1:]
    assert [section.split(".")[0] for section in sections] == [str(n + 1) for n in range(8)]
    for section in sections:
        told = section.split("\nTests")[1]
        files = re.findall(r"\]\(\.\./(tests/[\w/]+\.py)\)", told)
        assert files, section
        tests = "".join((ROOT / file).read_text() for file in files)
        for test in re.findall(r"`(test_\w+)`", told):
            assert f"def {test}(" in tests, test


def test_choosing_speaks_of_methods_that_are_there():
    known = {*mtlfast.methods(4), *mtlfast.weightings(4), "Compose"}
    table = re.findall(r"^\| \[.*", text_of("docs/choose.md"), re.MULTILINE)
    named = {name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[2])}
    assert len(named) >= 7
    assert named <= known


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of torch.vmap, which TorchJD uses
def test_the_table_of_the_readme_compares_the_same_step(monkeypatch):
    pytest.importorskip("torchjd")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme_table

    ways, model = readme_table.ways_to_step(num_tasks=2, width=32, layers=1)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    gradients = {}
    for way, step in ways.items():
        model.load_state_dict(start)
        step()
        gradients[way] = torch.cat([p.grad.flatten() for p in model.parameters()])
    plain = gradients.pop("no surgery")
    for way in gradients:
        torch.testing.assert_close(gradients[way], gradients["by hand"], msg=way)
    assert not torch.allclose(plain, gradients["by hand"], rtol=1e-2)  # they conflict


def test_the_readme_has_one_place_for_its_table(monkeypatch):
    pytest.importorskip("torchjd")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import readme_table

    ways = dict.fromkeys(["mtlfast", "TorchJD", readme_table.BATCHED], Timing((0.002, 0.003, 0.004)))
    written = readme_table.table({2: ways | {"TorchJD": Timing((0.009,))}}, rounds=3)
    assert "| 2 | 3 | 3 |" in written
    text, found = readme_table.PLACE.subn("here", text_of("README.md"))
    assert found == 1
    assert text.index("here") < text.index("## A program that trains")

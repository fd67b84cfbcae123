"""The snippets of docs/recipes.md run, and do what the page says."""

import re

import pytest
import torch
import torch.multiprocessing as mp
from pages import RECIPES, SNIPPETS, Snippet, pages, text_of
from torch import distributed

import mtlfast
from mtlfast import weighting
from mtlfast.aggregation import NashMTL, PCGrad
from mtlfast.weighting import LossWeighting

if RECIPES not in pages():
    pytest.skip("needs the checkout", allow_module_level=True)
LOOPS = [
    "loop",
    "surgery_optimizer",
    "lbfgs",
    "accumulator",
    "accumulation",
    "scaler",
    "loaders",
    "closures",
    "groups",
    "second",
    "state",
    "sparse",
    "storage",
    "hooks",
    "at",
    "compiled",
    "step",
    "activations",
    "learned",
    "update",
    "gradnorm",
]  # the other snippets have tests of their own
OTHERS = ["lora", "checkpoint", "resume", "tensorboard", "ranks", "lightning", "accelerate", "sweep"]


def recipe_of(name: str, change: tuple[str, str] | None = None) -> Snippet:
    return Snippet(RECIPES, name, change)


def test_every_snippet_has_a_test():
    assert {name for page, name in SNIPPETS if page == RECIPES} == {"setup", *LOOPS, *OTHERS}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains(name):
    recipe = recipe_of(name)
    before = recipe.loss()
    assert recipe.run().loss() < 0.9 * before


def test_clipping_freezing_and_schedules_work_on_what_backward_leaves():
    recipe = recipe_of("loop")
    steps = []

    def look(optimizer, *_):
        norm = torch.stack([p.grad.norm() for p in recipe.trunk.parameters() if p.grad is not None]).norm().item()
        steps.append((recipe.trunk[0].weight.detach().clone(), norm, optimizer.param_groups[0]["lr"]))

    recipe.optimizer.register_step_post_hook(look)
    recipe.run()
    weights, norms, rates = zip(*steps, strict=True)
    assert all(torch.equal(weights[0], weight) for weight in weights[:10])
    assert not torch.equal(weights[9], weights[10])
    assert max(norms) <= 1 + 1e-4
    assert rates == tuple(sorted(rates, reverse=True))
    assert rates[0] > rates[-1]


def test_an_optimizer_that_does_surgery_changes_no_step():
    recipe, hand = recipe_of("surgery_optimizer").run(), recipe_of("surgery_optimizer")
    optimizer = torch.optim.AdamW([*hand.trunk.parameters(), *hand.heads.parameters()], lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=20)
    for _ in range(20):
        optimizer.zero_grad()
        mtlfast.backward(hand.losses_of(hand.data), PCGrad(), shared=hand.trunk)
        torch.nn.utils.clip_grad_norm_(hand.trunk.parameters(), max_norm=1.0)
        optimizer.step()
        scheduler.step()
    assert torch.equal(recipe.parameters(), hand.parameters())
    assert recipe.result.weights.shape == (2,)


def test_a_closure_returns_the_loss_before_the_step():
    change = ("range(5)", "range(1)")
    assert recipe_of("lbfgs", change).run().names["loss"] == pytest.approx(recipe_of("lbfgs").loss())


def test_accumulated_gradients_are_those_of_one_large_batch():
    accumulated, whole = (
        recipe_of("accumulation", ("NashMTL()", "mtlfast.aggregation.Sum()")).run(),
        recipe_of("accumulation"),
    )
    for _ in range(5):
        whole.optimizer.zero_grad()
        sum(whole.losses_of(whole.data)).backward()
        whole.optimizer.step()
    torch.testing.assert_close(accumulated.parameters(), whole.parameters())


def test_accumulated_directions_are_about_as_long_as_one_large_batchs():
    recipe = recipe_of("accumulation").run()
    accumulated = recipe.trunk[0].weight.grad.norm()
    recipe.optimizer.zero_grad()
    mtlfast.backward(recipe.losses_of(recipe.data), NashMTL(), shared=recipe.trunk)
    assert 0.5 < accumulated / recipe.trunk[0].weight.grad.norm() < 1.5


def test_a_scaler_changes_no_step():
    scaled, plain = recipe_of("scaler").run(), recipe_of("scaler", ("init_scale=2.0**10", "enabled=False")).run()
    moved = (plain.parameters() - recipe_of("scaler").parameters()).norm()
    assert (scaled.parameters() - plain.parameters()).norm() < 0.01 * moved


def test_a_scaler_skips_a_step_that_overflows():
    recipe = recipe_of("scaler", ("2.0**10", "2.0**126"))
    before = recipe.parameters()
    recipe.run()
    assert torch.equal(recipe.parameters(), before)
    assert recipe.scaler.get_scale() == 2.0**121
    gram = torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert torch.equal(recipe.aggregator.weights(gram), NashMTL().weights(gram))


def test_a_loader_at_its_end_is_an_absent_task():
    result = recipe_of("loaders").run().result
    assert result.tasks == (0,)
    assert result.weights.shape == (1,)


def test_what_a_weighting_learns_is_learned():
    assert recipe_of("learned").run().weighting.log_var.ne(0).all()
    assert recipe_of("update").run().weighting.logits.ne(0).all()
    assert recipe_of("gradnorm").run().weighting.current_weights.ne(1).all()


def test_the_page_names_the_weightings_that_want_to_be_told():
    rows = re.findall(r"^\| (.*?) \| `update", text_of(RECIPES), re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    kinds = [kind for family in weighting.FAMILIES.values() for kind in family]
    assert named == {kind.__name__ for kind in kinds if kind.update is not LossWeighting.update}


def test_a_checkpoint_goes_on_where_it_was(tmp_path):
    recipe = recipe_of("checkpoint")
    before = recipe.loss()
    recipe.run().train(2)
    recipe.save(tmp_path / "checkpoint")
    drawn = torch.rand(3)
    recipe.train(2)
    assert recipe.loss() < before

    again = recipe_of("checkpoint").run()
    again.load(tmp_path / "checkpoint")
    assert torch.equal(torch.rand(3), drawn)
    again.train(2)
    assert torch.equal(again.parameters(), recipe.parameters())
    for name in ("aggregator", "weighting"):
        ours, theirs = again.names[name].state_dict(), recipe.names[name].state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_epoch_goes_on_in_the_middle_of_an_accumulation(tmp_path):
    recipe = recipe_of("resume").run()
    before = recipe.loss()
    list(recipe.epoch())
    for at in recipe.epoch():
        if at == 6:
            recipe.save(tmp_path / "checkpoint")
    assert list(recipe.epoch()) == list(range(1, 17))
    assert recipe.loss() < before

    again = recipe_of("resume").run()
    torch.manual_seed(1)
    rest = again.load(tmp_path / "checkpoint")
    assert len(again.accumulator) == 2
    assert list(rest) == list(range(7, 17))
    list(again.epoch())
    assert torch.equal(again.parameters(), recipe.parameters())


def test_tensorboard_has_every_step():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_of("tensorboard")
    before = recipe.loss()
    assert recipe.run().loss() < before
    events = EventAccumulator(recipe.writer.log_dir).Reload()
    curves = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    assert len(curves) == 3
    assert all([event.step for event in curve] == list(range(20)) for curve in curves.values())
    assert all(-1 <= event.value <= 1 for event in curves["cosine of the tasks' gradients"])


def rank(number: int, ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{file}", rank=number, world_size=ranks)
    recipe = recipe_of("ranks").run()
    for _ in range(3):
        recipe.step(recipe.data.chunk(ranks)[number])
    mine = recipe.parameters()
    both = [torch.empty_like(mine) for _ in range(ranks)]
    distributed.all_gather(both, mine)
    assert torch.equal(*both)
    distributed.barrier()  # a rank that leaves first breaks the other's connection
    distributed.destroy_process_group()

    alone, aggregator = recipe_of("ranks"), PCGrad()
    for _ in range(3):
        alone.optimizer.zero_grad()
        mtlfast.backward(alone.losses_of(alone.data), aggregator, shared=alone.trunk)
        alone.optimizer.step()
    torch.testing.assert_close(mine, alone.parameters())


def test_ranks_make_the_step_of_one_process_on_all_their_batches(tmp_path):
    mp.spawn(rank, args=(2, str(tmp_path / "rendezvous")), nprocs=2)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers:UserWarning")
def test_lightning_trains_as_by_hand():
    pytest.importorskip("lightning")
    recipe, hand = recipe_of("lightning").run(), recipe_of("lightning")
    before, aggregator = hand.loss(), PCGrad(order="fixed")
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(hand.optimizer, T_max=5)
    for _ in range(5):
        for x in hand.data.split(16):
            hand.optimizer.zero_grad()
            mtlfast.backward(hand.losses_of(x), aggregator, shared=hand.trunk)
            torch.nn.utils.clip_grad_norm_([*hand.trunk.parameters(), *hand.heads.parameters()], max_norm=1.0)
            hand.optimizer.step()
        scheduler.step()
    torch.testing.assert_close(recipe.parameters(), hand.parameters())
    assert recipe.loss() < 0.9 * before
    assert recipe.trainer.callback_metrics.keys() == {"loss of task 0", "loss of task 1"}


def test_accelerate_accumulates_as_by_hand(tmp_path):
    pytest.importorskip("accelerate")
    recipe, hand = recipe_of("accelerate").run(), recipe_of("accelerate")
    aggregator = PCGrad(order="fixed")
    for _ in range(5):
        for large in hand.data.split(32):
            hand.optimizer.zero_grad()
            for x in large.split(16):
                mtlfast.backward([loss / 2 for loss in hand.losses_of(x)], aggregator, shared=hand.trunk)
            hand.optimizer.step()
    assert torch.equal(recipe.parameters(), hand.parameters())
    recipe.accelerator.save_state(str(tmp_path))
    assert len(list(tmp_path.glob("custom_checkpoint*"))) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_train_and_what_they_adapt_does_not():
    pytest.importorskip("peft")
    recipe = recipe_of("lora")
    before, frozen = recipe.loss(), recipe.trunk[0].weight.detach().clone()
    assert recipe.run().loss() < 0.9 * before
    assert torch.equal(recipe.trunk[0].base_layer.weight, frozen)
    assert {name.split(".")[-3] for name, p in recipe.adapted.named_parameters() if p.grad is not None} == {
        "lora_A",
        "lora_B",
    }


def test_every_method_is_tried_from_the_same_start():
    recipe = recipe_of("sweep")
    before = [loss.item() for loss in recipe.losses_of(recipe.data)]
    reached = recipe.run().reached
    assert list(reached) == list(mtlfast.methods(2))
    assert all(sum(losses) < sum(before) for losses in reached.values())

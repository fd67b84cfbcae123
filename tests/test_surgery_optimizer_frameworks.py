"""`SurgeryOptimizer` in Accelerate, Lightning, Fabric and torch's distributed checkpoints."""

import itertools
from typing import Any

import pytest
import torch
from surgery_runs import OPTIMIZERS, Run, assert_equal, assert_same_end, both
from torch import nn
from torch.optim import lr_scheduler


def test_state_dicts_of_distributed_checkpoint():
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    one, other = both(OPTIMIZERS["AdamW, foreach"])
    one.train(range(5))
    saved = state_dict.get_optimizer_state_dict(one.model, one.optimizer)
    state_dict.set_optimizer_state_dict(other.model, other.optimizer, saved)
    assert_equal(other.optimizer.state_dict(), one.optimizer.state_dict())


def test_under_accelerate():
    accelerate = pytest.importorskip("accelerate")
    one, other = both(OPTIMIZERS["AdamW, foreach"])
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(one.model, one.optimizer)
    for x in one.data:
        optimizer.zero_grad()
        optimizer.optimizer.backward(model(x))
        optimizer.step()
    assert_same_end(one, other.train())


def test_accelerates_optimizer_sees_that_its_scaler_skips_a_step():
    accelerate = pytest.importorskip("accelerate")
    accelerate.Accelerator(cpu=True)
    run, scaler = Run(True, OPTIMIZERS["AdamW, foreach"]), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(run.optimizer, scaler=scaler)
    skipped, weights = [], [run.model.trunk[0].weight.detach().clone()]
    for factor in (1, float("inf"), 1):
        optimizer.zero_grad()
        run.backward([scaler.scale(factor * loss) for loss in run.model(run.data[0])])
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        weights.append(run.model.trunk[0].weight.detach().clone())
    assert skipped == [False, True, False]
    assert [torch.equal(one, other) for one, other in itertools.pairwise(weights)] == skipped


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:.*does not have many workers:UserWarning")
def test_under_lightning():
    lightning = pytest.importorskip("lightning")
    one, other = both(OPTIMIZERS["SGD with momentum"])

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.model = one.model

        def training_step(self, batch: Any, index: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.backward(self.model(batch))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()

        def on_train_epoch_end(self) -> None:
            self.lr_schedulers().step()

        def configure_optimizers(self) -> Any:
            return [one.optimizer], [lr_scheduler.StepLR(one.optimizer, step_size=1, gamma=0.5)]

    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(one.data, batch_size=None))
    scheduler = lr_scheduler.StepLR(other.optimizer, step_size=1, gamma=0.5)
    other.optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(other.model.parameters(), max_norm=0.5) and None
    )
    for _ in range(2):
        other.train()
        scheduler.step()
    assert_same_end(one, other)


def test_under_fabric():
    lightning = pytest.importorskip("lightning")
    one, other = both(OPTIMIZERS["SGD with momentum"])
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(one.model, one.optimizer)
    for x in one.data:
        optimizer.zero_grad()
        optimizer.backward(model(x))
        optimizer.step()
    assert_same_end(one, other.train())

"""A checkpoint of torch.distributed.checkpoint goes on on another number of ranks, and under another wrapper."""

import pytest
import torch
from ranked import on_ranks
from ranked_checkpoints import METHODS, alone, go_on, save

import mtlfast

WAYS = [("DDP", 4, "DDP", 2), ("FSDP2", 4, "FSDP2", 2), ("FSDP2", 2, "DDP", 3), ("DDP", 2, "alone", 1)]


@pytest.mark.parametrize(("before", "saving", "after", "loading"), WAYS, ids=lambda x: str(x))
def test_a_checkpoint_goes_on_elsewhere(before, saving, after, loading, tmp_path):
    on_ranks(saving, save, before, str(tmp_path))
    for of_rank in on_ranks(loading, go_on, after, str(tmp_path)):
        for name in METHODS:
            assert torch.allclose(of_rank[name], alone(name), rtol=0, atol=1e-9)


def test_a_name_that_was_not_saved(tmp_path):
    with pytest.warns(UserWarning, match="to save in a single process"):
        torch.distributed.checkpoint.save({"model": {"w": torch.ones(1)}}, checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="nothing under 'aggregator', expected a state dict"):
        mtlfast.distributed.load_state(tmp_path, "aggregator")

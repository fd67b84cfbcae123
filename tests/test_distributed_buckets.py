"""Pieces of gradients in buckets, without processes: the sums over simulated ranks are the mean gradients.

Seeded, so every run draws the same problems; MTLFAST_EXAMPLES multiplies their number (`make fuzz`).
"""

import os

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlfast._layout import is_dense, same_layout
from mtlfast.distributed._buckets import buckets_of
from mtlfast.distributed._memory_order import as_tensor, as_vector, piece_length, piece_range

slow = settings(
    max_examples=round(150 * float(os.environ.get("MTLFAST_EXAMPLES", "1"))), derandomize=True, deadline=None
)
shapes = st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=6)
layouts = st.sampled_from(["contiguous", "transposed", "channels_last", "with gaps"])
numbers_of_ranks = st.sampled_from([1, 2, 3, 4, 7, 8, 64, 512])


def laid_out(shape, layout, dtype):
    """A tensor of small whole numbers, whose sums are exact in every dtype."""
    values = torch.randint(-8, 9, shape).to(dtype)
    if layout == "transposed" and values.dim() > 1:
        return values.mT.contiguous().mT
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "with gaps" and values.dim():
        return torch.zeros(*shape[:-1], shape[-1] + 1, dtype=dtype)[..., :-1].copy_(values)
    return values


@slow
@given(shapes, st.lists(layouts, min_size=12, max_size=12), st.booleans(), numbers_of_ranks, st.data())
def test_buckets_of_all_ranks_make_the_mean(shapes, drawn, two_dtypes, ranks, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    most = data.draw(st.sampled_from([1, 100, 400, 2**20]))
    dtypes = [torch.float64 if two_dtypes and i % 3 == 2 else torch.float32 for i in range(len(shapes))]
    parameters = [laid_out(*of) for of in zip(shapes, drawn, dtypes, strict=False)]
    missing = torch.rand(min(ranks, 8), len(shapes)) < 0.2
    of_ranks = [  # a gradient need not lie in memory as its parameter; beyond eight ranks they repeat
        [None if gone else laid_out(*of) for gone, *of in zip(of_rank, shapes, drawn[6:], dtypes, strict=False)]
        for of_rank in missing
    ]
    of_ranks = [of_ranks[rank % len(of_ranks)] for rank in range(ranks)]
    zeros = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    means = [
        sum((g for g in column if g is not None), zero) / ranks for zero, *column in zip(zeros, *of_ranks, strict=True)
    ]

    buckets = buckets_of(parameters, ranks, most)
    assert [place for bucket in buckets for place in bucket.places] == list(range(len(shapes)))
    for bucket in buckets:
        sizes = [parameters[place].numel() * dtypes[place].itemsize for place in bucket.places]
        assert len(sizes) == 1 or sum(sizes) <= most
        assert len({dtypes[place] for place in bucket.places}) == 1
        total = torch.zeros(ranks, bucket.length, dtype=torch.float64)
        for gradients in of_ranks:
            total += bucket.filled(gradients, ranks, ranks)
        pieces = [bucket.split(row, rank, ranks) for rank, row in enumerate(total)]
        for i, place in enumerate(bucket.places):
            in_order = as_vector(means[place].double(), parameters[place])
            assert torch.allclose(torch.cat([of_rank[i] for of_rank in pieces]), in_order, rtol=0, atol=1e-5)
        kept = sum(len(piece) for of_rank in pieces for piece in of_rank)
        assert kept == sum(parameters[place].numel() for place in bucket.places)
        for place, whole in zip(bucket.places, bucket.whole(total), strict=True):
            assert torch.allclose(whole, means[place].double(), rtol=0, atol=1e-5)
            assert same_layout(whole, parameters[place].stride()) or not is_dense(parameters[place])


@slow
@given(st.integers(0, 5000), numbers_of_ranks)
def test_pieces_share_out_all_elements(count, ranks):
    ranges = [piece_range(count, rank, ranks) for rank in range(ranks)]
    assert [start for start, _ in ranges] == [0, *(end for _, end in ranges[:-1])]
    assert ranges[-1][1] == count
    lengths = [end - start for start, end in ranges]
    assert max(lengths) == piece_length(count, ranks) == -(-count // ranks)
    assert ranks * max(lengths) - count < ranks  # the padding


@slow
@given(st.lists(st.integers(0, 5), max_size=4), layouts, layouts)
def test_a_vector_is_the_tensor_in_the_order_of_memory(shape, of_parameter, of_gradient):
    parameter, gradient = (laid_out(shape, layout, torch.float32) for layout in (of_parameter, of_gradient))
    vector = as_vector(gradient, parameter)
    assert torch.equal(as_tensor(vector.contiguous(), parameter), gradient)
    if gradient.numel() and is_dense(parameter) and gradient.stride() == parameter.stride():
        assert vector.data_ptr() == gradient.data_ptr()  # no copy

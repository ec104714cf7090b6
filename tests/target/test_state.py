"""A rank's share of a flat buffer as boxes of its tensor."""

import pytest
import torch

from megatron_bliss.target.state import boxes


@pytest.mark.parametrize("shape", [(7,), (5, 4), (1, 6), (6, 1)])
def test_boxes_are_the_elements_in_order(shape):
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for start in range(whole.numel() + 1):
        for stop in range(start, whole.numel() + 1):
            found = boxes(start, stop, shape)
            slices = [tuple(slice(o, o + n) for o, n in zip(*box, strict=True)) for box in found]
            values = [value for box in slices for value in whole[box].flatten().tolist()]
            assert values == list(range(start, stop)) and len(found) <= 3

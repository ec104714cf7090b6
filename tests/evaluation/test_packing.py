"""Rows hold every request where its input's own tokens are, and nothing sees what it must not see."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_bliss.evaluation.packing import Request, make_batches, pack, rows_per_batch, waves
from megatron_bliss.target.layers import branch_mask

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
REQUESTS = st.lists(st.tuples(TOKENS, st.integers(1, 9)), min_size=1, max_size=25)


def as_requests(drawn: list) -> list[Request]:
    return [Request(tuple(t), tuple(range(min(n, len(t))))) for t, n in drawn]


def visible(row, column: int) -> list[int]:
    """Tokens that a column of a row sees, by position."""
    (mask,) = branch_mask(torch.tensor([row.branches]))[0]
    seen = sorted((row.positions[i], row.tokens[i]) for i in mask[column].nonzero().flatten().tolist())
    assert [position for position, _ in seen] == list(range(len(seen)))
    return [token for _, token in seen]


@given(REQUESTS, st.booleans(), st.integers(1, 40))
def test_every_request_sees_exactly_its_own_input(drawn, share, max_row) -> None:
    requests = as_requests(drawn)
    rows = pack(requests, share=share, max_row=max_row)
    assert sorted(n for row in rows for n in row.picks) == list(range(len(requests)))
    assert [len(r.tokens) for r in rows] == sorted((len(r.tokens) for r in rows), reverse=True)
    for row in rows:
        assert share or row.is_plain
        for number, columns in row.picks.items():
            tokens, targets = requests[number]
            ends = range(len(tokens) - len(targets) + 1, len(tokens) + 1)
            assert [visible(row, column) for column in columns] == [list(tokens[:end]) for end in ends]
    longest = max(len(r.tokens) for r in requests)
    assert all(len(row.tokens) <= max(max_row, longest) for row in rows)
    distinct = sum(len(tokens) for tokens in {request.tokens for request in requests})
    assert sum(len(row.tokens) for row in rows) <= distinct


@given(REQUESTS, st.integers(1, 60), st.integers(1, 4), st.integers(1, 3))
def test_waves_keep_the_budget_and_batches_have_one_shape(drawn, batch_tokens, batches, multiple) -> None:
    requests = as_requests(drawn)
    rows = pack(requests, share=True, max_row=20)
    found = list(waves(rows, batch_tokens=batch_tokens, batches=batches, multiple=multiple))
    assert [row for wave in found for row in wave] == rows
    for wave in found:
        made = make_batches(wave, batches, multiple)
        assert len(made) <= batches and len({batch.tokens.shape for batch in made}) == 1
        height, width = made[0].tokens.shape
        assert width % multiple == 0 and (height == 1 or height * width <= batch_tokens)
        assert height <= rows_per_batch(wave[0], batch_tokens, multiple)
        assert sum(len(batch.requests) for batch in made) == sum(len(row.picks) for row in wave)


def test_choices_of_a_question_share_it() -> None:
    question = tuple(range(10, 20))
    requests = [Request(question + rest, (1,)) for rest in ((), (1, 2), (1, 3), (4,))]
    (row,) = pack(requests, share=True, max_row=100)
    assert row.tokens == [*question, 1, 2, 1, 3, 4] and row.positions == [*range(10), 10, 11, 10, 11, 10]
    assert row.picks == {0: [9], 1: [11], 2: [13], 3: [14]} and not row.is_plain
    far = Request((10, 11, 7, 7, 7, 7, 7, 7, 7, 7), (1,))
    assert len(pack([*requests, far], share=True, max_row=100)) == 2, "too little in common"

"""The target in tensor, pipeline and data parallel layouts: lm-eval's answers, the same bits on every rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bliss.evaluation import evaluate_tasks
from megatron_bliss.evaluation.vocabulary import VocabularyPart, predict
from tests.distributed import run_distributed
from tests.evaluation import worlds
from tests.evaluation.answers import (
    TOLERANCE,
    TRAINED,
    as_requests,
    assert_same_answers,
    assert_same_results,
    some_generations,
    some_texts,
)
from tests.evaluation.conftest import World
from tests.targets import grouped, layout

LAYOUTS = {2: [(2, 1, False), (2, 1, True), (1, 2, False), (1, 1, False)], 4: [(2, 2, False)]}
"""World size -> (tensor, pipeline, sequence parallel); the rest of the ranks is data parallel."""
BATCH_TOKENS = 4000
VOCAB, WIDTH, STATES = 11, 5, 600  # more hidden states than a chunk


def vocabulary_problem() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers make equal logits equal to the bit: the first counts.
    weight = torch.randint(-3, 4, (VOCAB, WIDTH), generator=generator).float()
    weight[9] = weight[2]
    hidden = torch.randint(-3, 4, (STATES, WIDTH), generator=generator).float()
    places = torch.arange(STATES).repeat_interleave(2)
    return weight, hidden, places, torch.randint(VOCAB, (len(places),), generator=generator)


def check_vocabulary(log_likelihoods: list[float], best: list[int]) -> None:
    """Against a softmax over the whole vocabulary in fp64."""
    weight, hidden, places, targets = vocabulary_problem()
    logits = hidden.double() @ weight.double().t()
    expected = logits.log_softmax(-1)[places, targets]
    np.testing.assert_allclose(log_likelihoods, expected, rtol=0, atol=1e-5)
    assert best == logits.numpy().argmax(-1).tolist() and 2 in best and 9 not in best


def test_likelihoods_are_those_of_a_softmax_over_the_vocabulary() -> None:
    weight, hidden, places, targets = vocabulary_problem()
    found = predict(VocabularyPart(weight), hidden, places, targets)
    check_vocabulary(found.log_likelihoods.tolist(), found.best.tolist())


def run_layouts(rank: int, size: int, layouts: list, folders: dict, data_dir, pairs: list) -> dict:
    """On this rank: NeoX and LLaMA in an evaluation, NeoX's texts, the answers of a proxy."""
    found, requests = {}, as_requests(pairs)
    for sizes in layouts:
        with grouped(layout(*sizes)) as groups:
            model = worlds.target_model(folders["neox_trained"], layout(*sizes), groups, BATCH_TOKENS)
            answers, document = worlds.recorded_run(model, data_dir, groups)
            rolling, texts = model.loglikelihood_rolling(some_texts()), model.generate_until(some_generations(3))
            model = worlds.target_model(folders["llama_trained"], layout(*sizes), groups, BATCH_TOKENS)
            found[sizes] = answers, document, rolling, texts, worlds.recorded_run(model, data_dir, groups)
    with grouped(layout()) as groups:
        found["proxy"] = worlds.proxy_model(folders["neox_trained"], groups).loglikelihood(requests)
        found["error"] = error_of_one_rank(rank, groups, data_dir)
    found["vocabulary"] = split_vocabulary(rank)
    return found


def error_of_one_rank(rank: int, groups, data_dir) -> str:
    """What this rank raises where rank 1 alone finds a wrong file."""
    try:
        evaluate_tasks(None, ["piqa"] if rank == 1 else ["cloze"], data_dir, groups=groups)
    except ValueError as error:
        return str(error)
    return ""


def split_vocabulary(rank: int) -> list[list]:
    """Eight rows a rank: rank 1 has three tokens, those after it only padding."""
    weight, hidden, places, targets = vocabulary_problem()
    part = VocabularyPart(weight[8 * rank : 8 * rank + 8], 8 * rank, torch.distributed.group.WORLD)
    found = predict(part, hidden, places, targets)
    return [found.log_likelihoods.tolist(), found.best.tolist()]


@pytest.mark.parametrize("size", LAYOUTS)
def test_every_layout_gives_lm_evals_answers_on_every_rank(world: World, size: int) -> None:
    folders = {name: world.models[name] for name in TRAINED}
    pairs = [request.args for request in world.some]
    ranks = run_distributed(run_layouts, size, LAYOUTS[size], folders, world.data_dir, pairs)
    (found, *others) = ranks
    assert all(other == found for other in others)
    assert_same_answers(found.pop("proxy"), world.some_answers("neox_trained"))
    error = found.pop("error")
    assert "rank 1: " in error and "expected 1838 rows" in error
    check_vocabulary(*found.pop("vocabulary"))
    assert list(found) == LAYOUTS[size]
    with grouped(layout()) as groups:
        alone = worlds.target_model(folders["neox_trained"], layout(), groups, BATCH_TOKENS)
        expected_rolling = alone.loglikelihood_rolling(some_texts())
        expected_texts = alone.generate_until(some_generations(3))
    for answers, document, rolling, texts, of_llama in found.values():
        assert_same_answers(answers, world.answers["neox_trained"])
        assert_same_results(document, world.documents["neox_trained"])
        assert_same_answers(of_llama[0], world.answers["llama_trained"])
        assert_same_results(of_llama[1], world.documents["llama_trained"])
        assert rolling == pytest.approx(expected_rolling, abs=TOLERANCE) and texts == expected_texts

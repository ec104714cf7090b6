"""Every model of this package answers as lm-eval's own ``hf`` model does on the same weights, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.evaluation import HuggingFaceModel, TargetModel
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
from tests.evaluation.conftest import World, huggingface_reference
from tests.targets import grouped, layout


def check_model(model, world: World, name: str) -> None:
    answers, document = worlds.recorded_run(model, world.data_dir)
    assert_same_answers(answers, world.answers[name])
    assert_same_results(document, world.documents[name])


def test_there_is_something_to_get_wrong(world: World) -> None:
    tokenizer = load_tokenizer("huggingface", world.models["neox_random"])
    lengths = [len(tokens) for tokens in tokenizer.encode_batch([request.args[0] for request in world.requests])]
    assert len(lengths) == len(world.answers["neox_random"]) > 30 * worlds.ITEMS and max(
        lengths
    ) > worlds.MAX_LENGTH > min(lengths)
    random, trained = (world.documents[f"neox_{state}"]["tasks"]["cloze"]["metrics"] for state in ("random", "trained"))
    assert trained["perplexity"] < random["perplexity"] / 10
    for name in TRAINED:
        assert 0.01 < np.mean([greedy for _, greedy in world.answers[name]]) < 0.8
        assert 0 < world.documents[name]["average"] < 1


@pytest.mark.parametrize("name", worlds.MODELS)
def test_a_target_gives_lm_evals_answers(world: World, name: str) -> None:
    with grouped(layout()) as groups:
        check_model(worlds.target_model(world.models[name], layout(), groups), world, name)


@pytest.mark.parametrize("name", worlds.MODELS)
def test_a_proxy_and_an_export_give_lm_evals_answers(world: World, name: str) -> None:
    folder = world.models[name]
    exported = HuggingFaceModel(folder, batch_tokens=200)
    assert exported.max_length == worlds.MAX_LENGTH
    assert_same_answers(exported.loglikelihood(world.some), world.some_answers(name))
    assert_same_answers(worlds.proxy_model(folder).loglikelihood(world.some), world.some_answers(name))


@pytest.mark.parametrize("name", TRAINED)
def test_rolling_likelihoods_and_greedy_texts_are_lm_evals(world: World, name: str) -> None:
    reference = huggingface_reference(world.models[name], batch_size=1)
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models[name], layout(), groups)
        rolling = model.loglikelihood_rolling(some_texts())
        texts = model.generate_until(some_generations())
    assert rolling == pytest.approx(reference.loglikelihood_rolling(some_texts(), disable_tqdm=True), abs=TOLERANCE)
    assert texts == reference.generate_until(some_generations(), disable_tqdm=True)
    assert len(set(texts)) > 1


def test_spaces_and_empty_contexts_are_cut_as_lm_eval_cuts_them(world: World) -> None:
    pairs = [("", "aa bb"), ("", "<|endoftext|>aa bb"), ("aa bb ", "cc"), ("aa bb  ", " cc dd"), ("aa", "b cc")]
    pairs += [("<|endoftext|>aa", " bb")]
    requests = as_requests(pairs)
    folder = world.models["neox_trained"]
    with grouped(layout()) as groups:
        found = worlds.target_model(folder, layout(), groups).loglikelihood(requests)
    # One by one: lm-eval 0.4.13 mixes up requests that are one text cut at different places.
    reference = huggingface_reference(folder)
    expected = [reference.loglikelihood([request], disable_tqdm=True)[0] for request in requests]
    assert_same_answers(found, expected)
    assert abs(found[0][0] - found[-1][0]) > 1e-2


def test_a_first_token_stands_before_every_text_where_the_tokenizer_puts_one(world: World) -> None:
    """A tokenizer that puts a first token before every text, as LLaMA's does."""
    from lm_eval.models.huggingface import HFLM

    pairs = [("aa bb", " cc"), ("", "aa bb"), ("<|endoftext|>cc", " dd")]
    requests = as_requests(pairs) + world.some
    folder = world.models["llama_trained"]
    reference = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    plain = reference.tokenizer.encode
    reference.tokenizer.encode = lambda text, add_special_tokens=True: [0] * add_special_tokens + plain(text)
    with grouped(layout()) as groups:
        found = worlds.target_model(folder, layout(), groups, add_bos=True).loglikelihood(requests)
        without = worlds.target_model(folder, layout(), groups).loglikelihood(requests[:1])
    assert_same_answers(found, reference.loglikelihood(requests, disable_tqdm=True))
    assert abs(found[0][0] - without[0][0]) > 1e-2


def test_bf16_stays_near(world: World) -> None:
    tokenizer = load_tokenizer("huggingface", world.models["neox_trained"])
    with grouped(layout()) as groups:
        target = worlds.load_target(world.models["neox_trained"], layout(), groups, torch.bfloat16)
        model = TargetModel(target, groups, tokenizer, max_length=worlds.MAX_LENGTH, batch_tokens=200)
        found = model.loglikelihood(world.requests[:40])
    error = [abs(a[0] - b[0]) for a, b in zip(found, world.answers["neox_trained"], strict=False)]
    assert 1e-6 < max(error) < 1.0

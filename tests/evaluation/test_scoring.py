"""Bits, batches, the cache of finished requests, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance

from megatron_bliss.data.tokenizers import load_tokenizer
from megatron_bliss.evaluation import HuggingFaceModel, TargetModel, evaluate_tasks
from megatron_bliss.evaluation import scoring as scoring_module
from megatron_bliss.evaluation.request_cache import RequestCache
from megatron_bliss.evaluation.target_model import TargetBackbone
from tests.evaluation import worlds
from tests.evaluation.conftest import World
from tests.targets import grouped, layout


def answers(world: World, batch_tokens: int, share: bool = True) -> list:
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups, batch_tokens)
        model.backbone.shares_beginnings = share
        return model.loglikelihood(world.some)


def test_two_runs_are_bit_equal_and_batches_change_rounding_only(world: World) -> None:
    first = answers(world, 200)
    assert answers(world, 200) == first
    for other in (answers(world, 1), answers(world, 2000), answers(world, 200, share=False)):
        assert np.abs(np.array(other)[:, 0] - np.array(first)[:, 0]).max() < 1e-4
        assert [greedy for _, greedy in other] == [greedy for _, greedy in first]


def test_order_of_requests_does_not_change_their_answers(world: World) -> None:
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        assert model.loglikelihood(world.some[::-1]) == model.loglikelihood(world.some)[::-1]


def test_shared_beginnings_are_computed_once(world: World, monkeypatch) -> None:
    computed = []

    def counting(backbone, wave, requests):
        computed.append(sum(len(row.tokens) for row in wave))
        return original(backbone, wave, requests)

    original = scoring_module._score_wave
    monkeypatch.setattr(scoring_module, "_score_wave", counting)
    answers(world, 200, share=False)
    alone = sum(computed)
    computed.clear()
    answers(world, 200)
    assert 0 < sum(computed) < 0.6 * alone


def test_beginnings_are_shared_only_by_attention_that_takes_a_mask(world: World) -> None:
    with grouped(layout()) as groups:
        target = worlds.load_target(world.models["neox_trained"], layout(), groups)
        assert TargetBackbone(target, groups).shares_beginnings
        target[0].decoder.layers[1].self_attention.core_attention = torch.nn.Identity()
        assert not TargetBackbone(target, groups).shares_beginnings


class Killed(Exception):
    pass


def test_a_killed_evaluation_goes_on_and_ends_with_the_same_bits(world: World, tmp_path, monkeypatch) -> None:
    whole = answers(world, 200)
    original, waves = scoring_module._score_wave, []

    def dying(backbone, wave, requests):
        if len(waves) == 10:
            raise Killed
        waves.append(wave)
        return original(backbone, wave, requests)

    monkeypatch.setattr("megatron_bliss.evaluation.request_cache.SECONDS_BETWEEN_FILES", 0.0)
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        model.request_cache = tmp_path / "cache"
        monkeypatch.setattr(scoring_module, "_score_wave", dying)
        with pytest.raises(Killed):
            model.loglikelihood(world.some)
        monkeypatch.setattr(scoring_module, "_score_wave", lambda *a: waves.append(a[1]) or original(*a))
        assert model.loglikelihood(world.some) == whole
        total = len(waves)
        assert total > 15
        (tmp_path / "cache" / "requests-0.json").write_text("{}")
        assert model.loglikelihood(world.some) == whole and len(waves) == total, "all from the cache"
        other = worlds.target_model(world.models["neox_random"], layout(), groups)
        other.request_cache = tmp_path / "cache"
        assert other.loglikelihood(world.some[:20]) != whole[:20], "another model's requests are others"


def test_a_damaged_cache_file_is_warned_of(world: World, tmp_path) -> None:
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        cache = RequestCache(tmp_path, model.backbone)
        (tmp_path / "requests-1.json").write_text('{"a": [1')
        with pytest.warns(UserWarning, match="requests-1.json is no file of finished requests"):
            assert cache.find([]) == {}


def test_nan_weights_are_an_error(world: World) -> None:
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        model.backbone.target[0].decoder.final_layernorm.weight.data.fill_(torch.nan)
        with pytest.raises(FloatingPointError, match="not finite"):
            model.loglikelihood(world.some[:3])


def test_requests_that_cannot_be_answered_are_refused(world: World) -> None:
    folder = world.models["neox_trained"]
    tokenizer = load_tokenizer("huggingface", folder)
    with grouped(layout()) as groups:
        model = worlds.target_model(folder, layout(), groups)
        with pytest.raises(ValueError, match="continuation of at most 48"):
            model.loglikelihood([Instance("loglikelihood", {}, ("aa", " zz" * 60), 0)])
        with pytest.raises(ValueError, match="expected greedy ones"):
            model.generate_until([Instance("generate_until", {}, ("aa", {"until": [], "temperature": 1.0}), 0)])
        with pytest.raises(ValueError, match="max_gen_toks 48, expected less than the model's length 48"):
            model.generate_until([Instance("generate_until", {}, ("aa", {"until": [], "max_gen_toks": 48}), 0)])
        target = model.backbone.target
        with pytest.raises(ValueError, match="expected at least 2 and 1"):
            TargetModel(target, groups, tokenizer, max_length=1, batch_tokens=1)
        target[0].real_vocab_size = 10
        with pytest.raises(ValueError, match="a tokenizer of .* tokens and a model of 10"):
            TargetModel(target, groups, tokenizer, max_length=8, batch_tokens=8)


def test_other_families_are_left_to_lm_eval(world: World, tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="type gpt2 .* expected one of gpt_neox, llama"):
        HuggingFaceModel(tmp_path)


def test_progress_is_shown_with_what_is_left(world: World, capsys, monkeypatch) -> None:
    monkeypatch.setattr("megatron_bliss.base.progress.SECONDS_BETWEEN_LINES", 0.0)
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        evaluate_tasks(model, ["cloze"], world.data_dir, show_progress=True)
    lines = capsys.readouterr().err
    assert f"evaluate  {worlds.ITEMS}/{worlds.ITEMS} requests" in lines and "ETA" in lines and not model.show_progress


def test_a_target_keeps_its_gradients_and_mode(world: World) -> None:
    """An evaluation between two training segments leaves no trace."""
    with grouped(layout()) as groups:
        model = worlds.target_model(world.models["neox_trained"], layout(), groups)
        (chunk,) = model.backbone.target
        before = {name: parameter.clone() for name, parameter in chunk.named_parameters()}
        model.loglikelihood(world.some[:10])
        assert chunk.training and all(parameter.grad is None for parameter in chunk.parameters())
        assert all(torch.equal(before[name], parameter) for name, parameter in chunk.named_parameters())

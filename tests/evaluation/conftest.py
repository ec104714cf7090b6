"""Data files, models and lm-eval's own answers, made once for all tests of this folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs the [eval] extra")

from tests.evaluation import worlds  # noqa: E402

SOME_ITEMS = 16


@dataclass(frozen=True)
class World:
    """A data folder, model folders by name, requests of all tasks, and what lm-eval's ``hf`` model makes of them."""

    data_dir: Path
    models: dict[str, Path]
    requests: list
    answers: dict[str, list]
    documents: dict[str, dict]

    @property
    def some(self) -> list:
        """The requests of some items of every task, for what need not be asked of all."""
        return [request for request in self.requests if request.doc_id < SOME_ITEMS]

    def some_answers(self, name: str) -> list:
        """What lm-eval's model answers to ``some``."""
        pairs = zip(self.requests, self.answers[name], strict=True)
        return [answer for request, answer in pairs if request.doc_id < SOME_ITEMS]


def huggingface_reference(folder: Path, batch_size: int = 64):
    """lm-eval's own ``hf`` model on the CPU in fp32."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=batch_size)


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of every truncated request
    folder = tmp_path_factory.mktemp("evaluation")
    data_dir = worlds.write_data(folder / "data")
    tokenizer = worlds.train_tokenizer(folder / "tokenizer")
    models, answers, documents = {}, {}, {}
    requests = worlds.make_requests(data_dir, folder / "tasks")
    for name in worlds.MODELS:
        family, state = name.split("_")
        steps = 40 if state == "trained" else 0
        models[name] = worlds.save_model(folder / name, tokenizer, family, train_steps=steps)
        reference = huggingface_reference(models[name])
        answers[name], documents[name] = worlds.recorded_run(reference, data_dir)
    return World(data_dir, models, requests, answers, documents)

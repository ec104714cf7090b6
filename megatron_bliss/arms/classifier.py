"""Selection by a classifier that tells the guide from the shard: logistic regression on hashed n-grams of tokens.

Samples of the guide are one class, as many random units of the shard the other. A sample's features are the shares of
its n-grams in m buckets. A unit scores the log-odds of being of the guide. Quality filters of web corpora do the same
with fastText (as in the paper cited); here the optimum itself is found (logistic.py), so that there is no learning rate
and no number of epochs to choose.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_bliss.arms import logistic
from megatron_bliss.arms.arm import Arm
from megatron_bliss.arms.inputs import Inputs, Scores
from megatron_bliss.config.bounds import bounded


@dataclass(frozen=True)
class ClassifierConfig:
    """The arm classifier: logistic regression on hashed n-grams of tokens."""

    buckets: int = bounded(65_536, minimum=1)
    """m, buckets that n-grams are hashed into."""
    max_ngram: int = bounded(2, minimum=1)
    """Longest n-gram counted, in tokens; all shorter ones are, too."""
    samples: int = bounded(10_000, minimum=1)
    """Samples of the guide to learn from (all, where there are fewer), and as many units of the shard."""
    l2: float = bounded(1e-6, above=0)
    """Weight of half the squared norm of the weights beside the mean loss: the larger, the less rare n-grams count."""


def scores(options: ClassifierConfig, inputs: Inputs) -> Scores:
    """Log-odds of being of the guide: the main rank learns them, each rank scores its part of the shard."""
    from megatron_bliss.arms.ngrams import NgramBuckets, ngrams_of
    from megatron_bliss.arms.reading import score_by_scorer
    from megatron_bliss.base.parallel import broadcast_object, failing_together
    from megatron_bliss.scorers.ngrams import NgramForm, NgramScorer
    from megatron_bliss.selection.score_pass import save_array

    counter = NgramBuckets(options.buckets, options.max_ngram, inputs.eod)

    def features(source: Any, ids: np.ndarray) -> logistic.Occurrences:
        return logistic.Occurrences(*ngrams_of(counter, source, ids), len(ids), options.buckets)

    path, groups, learned = inputs.folder / "classifier.npy", inputs.groups, None
    guide, units = drawn(options, inputs)
    with failing_together(groups):
        if groups.is_main:
            if not path.is_file():  # a killed stage goes on with the classifier that it has
                path.parent.mkdir(parents=True, exist_ok=True)
                classes = features(inputs.reference, guide), features(inputs.source, units)
                save_array(path, _learn(*classes, options.l2))
            learned = np.load(path, allow_pickle=False)
    learned = broadcast_object(learned, groups)
    weights, (bias, loss) = learned[:-2], learned[-2:]
    form = NgramForm(options.max_ngram, inputs.vocab_size, inputs.eod, "mean", float(bias))
    scorer = NgramScorer(form, weights)
    values = score_by_scorer(scorer, inputs, inputs.folder / "blocks", "classifier")
    samples = {"guide_samples": len(guide), "shard_units": len(units)}
    return Scores(
        values, {"method": "classifier", **asdict(options), **samples, "training_loss": float(loss)}, scorer=scorer
    )


def drawn(options: ClassifierConfig, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Samples of the guide and units of the shard to learn from, int64, in random order."""
    from megatron_bliss.data.guide import draw_samples

    generator = np.random.Generator(np.random.PCG64(inputs.seed))
    guide = draw_samples(inputs.reference, options.samples, generator)
    return guide, generator.permutation(len(inputs.source))[: len(guide)]


def _learn(guide: logistic.Occurrences, units: logistic.Occurrences, l2: float) -> np.ndarray:
    """Weights of the buckets, bias and loss: float64 [m + 2]."""
    for name, found in (("guide", guide), ("shard", units)):
        if not len(found.samples):
            raise ValueError(f"found no n-gram in the {name}, expected text: check its tokens and its eod token")
    found = logistic.fit(guide, units, l2)
    return np.array([*found.weights, found.bias, found.loss])


ARM = Arm(
    "log-odds of being of the guide, by logistic regression on hashed n-grams: what fastText-like quality filters do",
    scores,
    paper="2406.11794",
    settings=ClassifierConfig,
)

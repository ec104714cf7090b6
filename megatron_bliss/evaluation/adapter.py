"""A model of this package as lm-eval's ``TemplateLM``: texts in, log-likelihoods and greedy texts out.

Tokens, truncation and answers follow lm-eval's own Hugging Face model; what differs is only how much is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from megatron_bliss.data.tokenizers import Tokenizer
from megatron_bliss.evaluation.backbone import Backbone
from megatron_bliss.evaluation.generation import generate
from megatron_bliss.evaluation.packing import Request
from megatron_bliss.evaluation.request_cache import RequestCache
from megatron_bliss.evaluation.scoring import score

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""(context and continuation as texts, tokens of the context, tokens of the continuation)."""


class Adapter(TemplateLM):
    """lm-eval's view of a backbone and a tokenizer. Collective: every rank asks for the same and gets the same."""

    def __init__(
        self,
        backbone: Backbone,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,
        max_length: int,
        batch_tokens: int,
        add_bos: bool = False,
        prefix_token: int | None = None,
    ) -> None:
        super().__init__()
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"found a tokenizer of {tokenizer.vocab_size} tokens and a model of {vocab_size}, expected the model's "
                "own tokenizer: change the tokenizer"
            )
        if max_length < 2 or batch_tokens < 1:
            raise ValueError(
                f"found max_length {max_length} and batch_tokens {batch_tokens}, expected at least 2 and 1: change them"
            )
        self.backbone, self.text_tokenizer = backbone, tokenizer
        self.max_length, self.batch_tokens, self.add_bos = max_length, batch_tokens, add_bos
        self._prefix_token = tokenizer.eod if prefix_token is None else prefix_token
        self.show_progress = False
        self.request_cache: Path | None = None
        """Folder of finished requests; they are not computed again."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.text_tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context, and with ``add_bos`` before every text."""
        return self._prefix_token

    @property
    def max_gen_toks(self) -> int:
        """Tokens generated where a task doesn't say."""
        return 256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Tokens of a text; ``add_special_tokens`` overrides ``add_bos``."""
        return self.encode([string], add_special_tokens)[0]

    def encode(self, texts: Sequence[str], add_special_tokens: bool | None = None) -> list[list[int]]:
        """Tokens of texts; a text that already begins with the prefix token gets no second one."""
        encoded = self.text_tokenizer.encode_batch(texts)
        if not (self.add_bos if add_special_tokens is None else add_special_tokens):
            return encoded
        prefix = [self.prefix_token_id]
        return [
            tokens if add_special_tokens is None and tokens[:1] == prefix else prefix + tokens for tokens in encoded
        ]

    def loglikelihood(self, requests: Sequence, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy decoding gives it) of each request's (context, continuation)."""
        pairs = [request.args for request in requests]
        return self._loglikelihood_tokens(encode_pairs(pairs, self.encode, self.prefix_token_id))

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: object) -> list[tuple[float, bool]]:
        return score(
            self.backbone,
            [self._request(*request) for request in requests],
            batch_tokens=self.batch_tokens,
            cache=self._open_cache(),
            show_progress=self.show_progress,
        )

    def _request(self, pair: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Request:
        """The last tokens of both that the model can see, the very last one only being predicted."""
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"found {len(context)} tokens of context and {len(continuation)} of continuation in {pair!r}, expected "
                f"at least one of each and a continuation of at most {self.max_length}, the model's length"
            )
        return Request(tuple((context + continuation)[-(self.max_length + 1) : -1]), tuple(continuation))

    def _open_cache(self) -> RequestCache | None:
        if self.request_cache is None:
            return None
        return RequestCache(self.request_cache, self.backbone)

    def loglikelihood_rolling(self, requests: Sequence, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each request's whole text, in windows of the model's length after the prefix token."""
        windows: list[Encoded] = []
        counts = []
        for tokens in self.encode([request.args[0] for request in requests]):
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            mine = [(None, *make_disjoint_window(window)) for window in cut]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence, disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations up to a stop string; ValueError where a request asks for sampling."""
        jobs = []
        stops = []
        contexts = self.encode([request.args[0] for request in requests])
        for tokens, request in zip(contexts, requests, strict=True):
            options = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if options["do_sample"]:
                raise ValueError(f"found generation options {request.args[1]}, expected greedy ones: do_sample: false")
            stop = handle_stop_sequences(options["until"], eos=self.text_tokenizer.decode([self.eot_token_id]))
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"found max_gen_toks {options['max_gen_toks']}, expected less than the model's length "
                    f"{self.max_length}: change the task's generation options"
                )
            jobs.append((tokens[-room:] or [self.prefix_token_id], stop, options["max_gen_toks"]))
            stops.append(stop)
        texts = generate(self.backbone, self.text_tokenizer, jobs, batch_tokens=self.batch_tokens)
        return [postprocess_generated_text(text, stop, None) for text, stop in zip(texts, stops, strict=True)]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], encode: Callable[..., list[list[int]]], prefix_token: int
) -> list[Encoded]:
    """Contexts and continuations as tokens, each text encoded once: spaces that end a context begin the continuation.

    An empty context becomes the prefix token, unless the continuation begins with it. ``encode(texts)`` may put a first
    token before each, ``encode(texts, add_special_tokens=False)`` must not.
    """
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    texts = dict.fromkeys(text for context, rest in moved if context for text in (context, context + rest))
    alone = dict.fromkeys(rest for context, rest in moved if not context)
    tokens = dict(zip(texts, encode(list(texts)), strict=True))
    tokens_alone = dict(zip(alone, encode(list(alone), add_special_tokens=False) if alone else [], strict=True))
    encoded = []
    for pair, (context, rest) in zip(pairs, moved, strict=True):
        if context:
            start = tokens[context]
            encoded.append((pair, start, tokens[context + rest][len(start) :]))
        elif tokens_alone[rest][:1] == [prefix_token]:
            encoded.append((pair, [prefix_token], tokens_alone[rest][1:]))
        else:
            encoded.append((pair, [prefix_token], tokens_alone[rest]))
    return encoded


def _move_spaces(context: str, continuation: str) -> tuple[str, str]:
    """lm-eval's rule. It has none for a context of spaces alone, which is taken for an empty one."""
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation

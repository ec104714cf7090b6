"""Run folders to report on, whole and in pieces, with hostile text in them; and what a page must be."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import yaml

from megatron_bliss.base.metrics import MetricsLogger
from megatron_bliss.data.ingest.preprocess import PreprocessSettings, preprocess
from megatron_bliss.data.subset import write_subset
from megatron_bliss.report.costs import read_stages
from megatron_bliss.report.summary import build_summary

HOSTILE = (
    "<script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> \"' & \x07\x1b\u202e </pre></details>"
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Checks that every tag is closed in order, and keeps tags, attributes and text for the tests."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open_tags, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert not self.open_tags, f"never closed: {self.open_tags}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute"
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open_tags and self.open_tags[-1] == tag, f"</{tag}> closes {self.open_tags[-3:]}"
        self.open_tags.pop()

    def handle_data(self, data):
        self.text += data


def check_page(text: str) -> Page:
    """Well-formed, without scripts, and nothing in it makes a browser fetch anything."""
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and text.count("</html>") == 1
    assert not {"script", "img", "link", "iframe", "object", "embed", "a", "base", "form"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), f"an event handler: {name}"
        if name in ("href", "src", "xlink:href", "data", "action", "srcset", "poster"):
            assert value.startswith("#"), f"{name} points outside the page: {value}"
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert "@import" not in style and not re.search(r"url\((?!#)", text)
    identifiers = [value for name, value in page.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))
    targets = {value[1:] for name, value in page.attributes if name == "xlink:href"}
    assert targets <= set(identifiers)
    return page


def write_config(folder: Path, **changes) -> str:
    config = {
        "arms": ["bliss", "random"], "rounds": 2, "seed": 7,
        "data": {"train_prefix": str(folder / "pool"), "seq_length": 64},
        "pretraining": {"warmup_iters": 50, "train_iters": 100, "global_batch_size": 4},
        "bilevel": {"global_batch_size": 8},
    }  # fmt: skip
    text = yaml.safe_dump(config | changes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)
    return text


def write_metrics(folder: Path, rounds: int) -> None:
    logger = MetricsLogger(folder, is_writer=True, tensorboard=False)
    for step in range(1, 6):
        logger.log(step, {"loss": 9.0 / step, "lr": 1e-3}, arm="shared", round=0, stage="target")
    for number in range(1, rounds + 1):
        for step in range(1, 41):
            values = {"validation_loss": 5.0 + 1 / step, "kl": math.nan if step == 7 else 0.1, "residual": 10.0**-step}
            values |= {"entropy": 2.0, "effective_samples": math.exp(2.0), "score_mean": 0.5, "score_std": 0.1}
            logger.log(step, values, arm="bliss", round=number, stage="bilevel")
        for arm in ("bliss", "random"):
            logger.log(number * 10, {"loss": 5.0, "grad_norm": 1.0}, arm=arm, round=number, stage="pretrain")
    logger.close()


def write_stage(folder: Path, place: str) -> Path:
    (folder / place).mkdir(parents=True)
    (folder / place / "done.json").write_text(json.dumps({"seconds": 61.5, "peak_bytes": 2**30, "flops": 3e12}))
    return folder / place


def write_shards(folder: Path, units: int) -> None:
    lines = [json.dumps({"text": f"unit {i}", "domain": ("prose", HOSTILE)[i % 2]}) for i in range(3 * units)]
    (folder / "pool.jsonl").write_text("\n".join(lines) + "\n")
    preprocess(PreprocessSettings([str(folder / "pool.jsonl")], str(folder / "pool"), tokenizer_type="bytes"))
    prefixes = [
        write_subset(folder / "pool", np.arange(k * units, (k + 1) * units), folder / "shards", label=f"shard{k}")
        for k in range(3)
    ]
    (folder / "shards/done.json").write_text(json.dumps({"prefixes": [Path(prefix).name for prefix in prefixes]}))


def write_summary(folder: Path, config_text: str) -> None:
    def measured(losses):
        return [
            {"iteration": 50 * i, "tokens": 12800 * i, "losses": {"lambada": loss, HOSTILE: loss + 1}}
            for i, loss in enumerate(losses, start=1)
        ]

    shares = {"pool": {"prose": 0.5, HOSTILE: 0.5}, "selected": {"bliss": {"prose": 0.9, HOSTILE: 0.1}}}
    summary = build_summary(
        {"bliss": measured([8, 6, 4, 3]), "random": measured([8, 7, 6, 5])},
        stages=read_stages(folder), domains_by_field={"domain": shares}, seed=7, config_text=config_text,
    )  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))


def write_whole_run(folder: Path) -> None:
    """Two rounds of two arms, finished."""
    text = write_config(folder, note=HOSTILE)
    write_metrics(folder, rounds=2)
    write_shards(folder, units=100)
    write_stage(folder, "warmup/target")
    for number in (1, 2):
        for arm in ("bliss", "random"):
            scores = write_stage(folder, f"{arm}/round_{number:02d}/score")
            np.save(scores / "scores.npy", np.linspace(0, 1, 100, dtype=np.float32))
            select = write_stage(folder, f"{arm}/round_{number:02d}/select")
            sample = {"text": HOSTILE + "long " * 1000, "score": 0.75, "domain": HOSTILE, "url": f"http://e/{HOSTILE}"}
            samples = {"best": [sample], "worst": [{"text": None, "score": 0.25}]}
            (select / "samples.json").write_text(json.dumps(samples))
            write_stage(folder, f"{arm}/round_{number:02d}/evaluate")
    write_summary(folder, text)

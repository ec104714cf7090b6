"""Does the target's evaluation give lm-eval's own numbers? The ten tasks, on small models, in every layout.

    python examples/studies/evaluation_parity.py --data-dir evaluation-data --tokenizer-model tokenizer.json \
        --text 'documents/*.jsonl.gz' --output docs/results/evaluation.md

For GPT-NeoX and LLaMA, random and trained for some steps on the given text, a Hugging Face folder is written and scored
by lm-eval's ``hf`` backend on the CPU in fp32; then the target loads the same weights under each layout. Reported: the
largest difference of a request's log-likelihood, requests whose greedy answer differs, items of which another choice is
taken and by how much the two choices differ. The backend at half the batch is a row as well: what rounding alone does.
Finished parts stay in ``--work-dir``; a second run, or runs of other families side by side, go on from there.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tools/, when run as a script

from megatron_bliss.base import parallel  # noqa: E402
from megatron_bliss.base.files import atomic_file, read_json, write_json  # noqa: E402
from megatron_bliss.config.models import ModelConfig, TargetConfig  # noqa: E402
from megatron_bliss.config.platform import PlatformConfig  # noqa: E402
from megatron_bliss.data.tokenizers import load_tokenizer  # noqa: E402
from megatron_bliss.evaluation import TASK_NAMES, TargetModel, evaluate_tasks  # noqa: E402
from megatron_bliss.evaluation.data_files import read_task  # noqa: E402
from megatron_bliss.evaluation.tasks import make_task  # noqa: E402
from megatron_bliss.models.convert import converted, huggingface_layout, proxy_layout, reader, target_layout  # noqa: E402
from megatron_bliss.models.huggingface import config_json, open_huggingface, write_weights  # noqa: E402
from megatron_bliss.models.transformer import LanguageModel, build_lm  # noqa: E402
from megatron_bliss.target.model import build_target  # noqa: E402
from megatron_bliss.target.weights import load_full_weights  # noqa: E402
from tools.benchmarks.measure import machine  # noqa: E402

LAYOUTS = {"TP 1": (1, 1, 1), "TP 2": (2, 1, 2), "PP 2": (1, 2, 2), "TP 2 x PP 2": (2, 2, 4), "DP 2": (1, 1, 2)}
"""Name -> (tensor, pipeline, processes)."""
HALF_BATCH = "hf, half the batch"
"""lm-eval's backend again, its requests batched otherwise."""
FAMILIES = {"gpt_neox": "GPT-NeoX", "llama": "LLaMA"}
MAX_LENGTH = 1024


def make_model(folder: Path, family: str, steps: int, options: argparse.Namespace) -> None:
    """A model folder as transformers reads it, its weights trained for ``steps`` steps."""
    tokenizer = load_tokenizer("huggingface", options.tokenizer_model)
    config = ModelConfig(
        architecture=family,
        num_layers=options.num_layers,
        hidden_size=options.hidden_size,
        num_attention_heads=options.num_attention_heads,
        num_query_groups=options.num_attention_heads // (2 if family == "llama" else 1),
    )
    lm = build_lm(config, vocab_size=tokenizer.vocab_size, seed=1)
    train(lm, token_batches(options, tokenizer), steps)
    arch, folder_json = lm.architecture, folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    named = dict(lm.named_parameters())
    exported = converted(lambda name: named[name].detach(), proxy_layout(arch), huggingface_layout(arch))
    write_weights(folder, exported)
    write_json(folder_json, config_json(arch, torch.float32, MAX_LENGTH, tokenizer.eod))
    (folder / "tokenizer.json").write_bytes(Path(options.tokenizer_model).read_bytes())
    end = tokenizer.decode([tokenizer.eod])
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
    write_json(folder / "tokenizer_config.json", described)


def token_batches(options: argparse.Namespace, tokenizer) -> Iterator[torch.Tensor]:
    """Batches [8, 129] of running text."""
    kept: list[int] = []
    for path in sorted(glob.glob(options.text)):
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as stream:
            for line in stream:
                kept += [*tokenizer.encode_batch([json.loads(line)["text"]])[0], tokenizer.eod]
                while len(kept) >= 8 * 129:
                    yield torch.tensor(kept[: 8 * 129]).view(8, 129)
                    kept = kept[8 * 129 :]


def train(lm: LanguageModel, batches: Iterator[torch.Tensor], steps: int) -> None:
    """Plain AdamW; ValueError where the text is too short."""
    optimizer = torch.optim.AdamW(lm.parameters(), lr=2e-3)
    for _ in range(steps):
        tokens = next(batches, None)
        if tokens is None:
            raise ValueError("found too little text for --train-steps, expected 1,032 tokens a step: change --text")
        logits = lm.hidden_states(tokens[:, :-1]) @ lm.output_weight.t()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def recorded(model, options: argparse.Namespace, groups=None) -> dict:
    """Evaluate; the document, all requests with their answers, and the seconds that the requests took."""
    found: dict = {"requests": [], "answers": [], "seconds": 0.0}
    ask: Callable = model.loglikelihood

    def asking(requests: list, **_: object) -> list:
        start = time.perf_counter()
        answers = ask(requests, disable_tqdm=True)
        found["seconds"] += time.perf_counter() - start
        found["answers"] += answers
        found["requests"] += [[r.task_name, r.doc_id, r.idx, len(r.args[1].lstrip())] for r in requests]
        return answers

    model.loglikelihood = asking
    found["document"] = evaluate_tasks(
        model,
        options.tasks.split(","),
        options.data_dir,
        limit=options.limit,
        groups=groups,
        show_progress=True,
        allow_unknown_data=True,
    )
    return found


def write_found(path: str, found: dict) -> None:
    """Answers as an array, the rest as JSON."""
    np.save(f"{path}.npy", np.array(found.pop("answers"), dtype=np.float64))
    write_json(f"{path}.json", found)


def score_reference(options: argparse.Namespace) -> None:
    """In a process of its own: lm-eval's ``hf`` backend."""
    import logging

    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HFLM(pretrained=options.model, device="cpu", dtype="float32", batch_size=options.batch_size)
    write_found(options.found, recorded(model, options))


def score_layout(options: argparse.Namespace) -> None:
    """In every process of a layout: the target."""
    tensor, pipeline, _ = LAYOUTS[options.layout]
    config = TargetConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    groups = parallel.initialize(PlatformConfig(device="cpu"), config, seed=1)
    try:
        arch, files = open_huggingface(options.model)
        target = build_target(config, arch, groups, seq_length=MAX_LENGTH, params_dtype=torch.float32, seed=2)
        load_full_weights(target, reader(files, huggingface_layout(arch), target_layout(arch)), groups)
        tokenizer = load_tokenizer("huggingface", options.model)
        batch_tokens = options.batch_size * MAX_LENGTH // 2
        model = TargetModel(target, groups, tokenizer, max_length=MAX_LENGTH, batch_tokens=batch_tokens)
        found = recorded(model, options, groups)
        if groups.is_main:
            write_found(options.found, found)
    finally:
        parallel.destroy()


def run_part(options: argparse.Namespace, model: Path, layout: str | None, found: Path) -> dict:
    """One measurement in new processes, or what an earlier run found; torchrun starts the processes of a layout."""
    if Path(f"{found}.json").exists():
        return read_json(f"{found}.json") | {"answers": np.load(f"{found}.npy")}
    mine = [os.path.abspath(__file__), "--model", str(model), "--found", str(found)]
    batch_size = options.batch_size // 2 if layout == HALF_BATCH else options.batch_size
    mine += ["--data-dir", options.data_dir, "--tasks", options.tasks, "--batch-size", str(batch_size)]
    if options.limit:
        mine += ["--limit", str(options.limit)]
    start = [sys.executable]
    if layout in LAYOUTS:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(LAYOUTS[layout][2])]
        mine += ["--layout", layout]
    subprocess.run([*start, *mine], check=True)
    return read_json(f"{found}.json") | {"answers": np.load(f"{found}.npy")}


@dataclass(frozen=True)
class Choice:
    """An item of which another choice is taken than the reference takes, by log-likelihood (scale 1) or per character:
    the two choices, and how far the reference has them apart (nats, of the whole choice)."""

    task: str
    document: int
    taken: int
    reference: int
    scales: tuple[float, float]
    gap: float


def other_choices(found: dict, expected: dict) -> list[Choice]:
    """One for every item and metric."""
    items: dict = defaultdict(list)
    for request, ours, theirs in zip(expected["requests"], found["answers"], expected["answers"], strict=True):
        task, document, choice, length = request
        items[task, document].append((choice, length, ours[0], theirs[0]))
    different, tasks = [], expected["document"]["tasks"]
    for (task, document), choices in items.items():
        _, length, ours, theirs = np.array(sorted(choices)).T
        scales = [np.ones_like(length), length]
        for scale in scales[: 1 + ("acc_norm" in tasks[task]["metrics"])]:
            taken, reference = int((ours / scale).argmax()), int((theirs / scale).argmax())
            if taken != reference:
                gap = float((theirs / scale)[reference] - (theirs / scale)[taken]) * float(scale[taken])
                both = float(scale[taken]), float(scale[reference])
                different.append(Choice(task, document, taken, reference, both, gap))
    return different


def right_choices(different: list[Choice], model: Path, options: argparse.Namespace) -> int:
    """How often lm-eval's backend in fp64 prefers the choice that was taken to that of the fp32 reference."""
    if not different:
        return 0
    from lm_eval.models.huggingface import HFLM

    wanted = {(choice.task, choice.document) for choice in different}
    requests = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted({choice.task for choice in different}):
            task = make_task(name, read_task(name, Path(options.data_dir), allow_unknown=True), Path(folder))
            task.build_all_requests(rank=0, world_size=1)
            requests += [one for one in task.instances if (name, one.doc_id) in wanted]
    exact = HFLM(pretrained=str(model), device="cpu", dtype="float64", batch_size=1)
    answers = exact.loglikelihood(requests, disable_tqdm=True)
    value = {(one.task_name, one.doc_id, one.idx): answer[0] for one, answer in zip(requests, answers, strict=True)}
    return sum(
        value[c.task, c.document, c.taken] / c.scales[0] > value[c.task, c.document, c.reference] / c.scales[1]
        for c in different
    )


def compare(name: str, layout: str, found: dict, expected: dict, model: Path, options: argparse.Namespace) -> dict:
    """One row of the table; ValueError where the two did not answer the same requests."""
    ours, theirs = found["answers"], expected["answers"]
    if found["requests"] != expected["requests"]:
        raise ValueError(
            f"found {len(ours)} answers of {name} in {layout}, expected {len(theirs)} to the same requests"
        )
    tasks, reference = found["document"]["tasks"], expected["document"]["tasks"]
    accuracies = [
        (task, metric) for task in tasks for metric in ("acc", "acc_norm") if metric in tasks[task]["metrics"]
    ]
    different = other_choices(found, expected)
    return {
        "model": name,
        "layout": layout,
        "requests": len(ours),
        "largest_difference": float(np.abs(ours[:, 0] - theirs[:, 0]).max()),
        "greedy_differs": int((ours[:, 1] != theirs[:, 1]).sum()),
        "different_accuracies": [
            f"{t} {m}" for t, m in accuracies if tasks[t]["metrics"][m] != reference[t]["metrics"][m]
        ],
        "accuracies": len(accuracies),
        "other_choices": len(different),
        "largest_gap": max((choice.gap for choice in different), default=0.0),
        "right_choices": right_choices(different, model, options),
        "seconds": found["seconds"],
        "reference_seconds": expected["seconds"],
    }


def markdown(rows: list[dict], documents: dict[str, dict], options: argparse.Namespace) -> str:
    """The page."""
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine(torch.device("cpu")).items())
    vocab_size = load_tokenizer("huggingface", options.tokenizer_model).vocab_size
    items = f"the first {options.limit} items of each task" if options.limit else "all items"
    lines = [
        "# Evaluation against lm-eval's hf backend",
        f"\nBy `examples/studies/evaluation_parity.py`: {described}, lm-eval"
        f" {next(iter(documents.values()))['lm_eval_version']}.\n",
        f"{options.num_layers} layers x {options.hidden_size}, vocabulary {vocab_size:,}, fp32; trained:"
        f" {options.train_steps} steps of 1,024 tokens. {items.capitalize()}. Difference: largest of any request's"
        " log-likelihood (nats). Other choices: items, by log-likelihood and by log-likelihood per character, of which"
        " another choice is taken than hf takes; their gap: the most that hf has the two choices apart (nats);"
        " right in fp64: how many of them hf takes itself in fp64.\n",
        "| model | layout | requests | difference | greedy differs | other choices | their gap | right in fp64 |"
        " accuracies that differ | seconds | hf's seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        differing = row["different_accuracies"]
        cells = [
            row["model"],
            row["layout"],
            f"{row['requests']:,}",
            f"{row['largest_difference']:.1e}",
            row["greedy_differs"],
            row["other_choices"],
            f"{row['largest_gap']:.1e}" if row["other_choices"] else "",
            row["right_choices"] if row["other_choices"] else "",
            f"{len(differing)} of {row['accuracies']}" + (f" ({', '.join(differing)})" if differing else ""),
            f"{row['seconds']:.0f}",
            f"{row['reference_seconds']:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "What lm-eval's backend found (value of acc_norm where the task has it, else acc):", ""]
    lines += ["| task | items | " + " | ".join(documents) + " |", "| --- | ---: |" + " ---: |" * len(documents)]
    for task in next(iter(documents.values()))["tasks"]:
        cells = [document["tasks"][task] for document in documents.values()]
        values = " | ".join(f"{100 * cell['value']:.1f} ± {100 * cell['stderr']:.1f}" for cell in cells)
        lines.append(f"| {task} | {cells[0]['num_items']:,} | {values} |")
    return "\n".join(lines) + "\n"


def study(options: argparse.Namespace, folder: Path) -> str:
    """All models and layouts, in ``folder``; the page. ValueError where the folder holds the parts of other options."""
    varying = ("families", "states", "layouts", "work_dir", "output", "model", "layout", "found")
    given = {name: value for name, value in vars(options).items() if name not in varying}
    options_file = folder / "options.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not options_file.exists():
        write_json(options_file, given)
    if read_json(options_file) != given:
        raise ValueError(f"found parts of {read_json(options_file)} in {folder}, expected {given}: change --work-dir")
    rows, documents = [], {}
    for family in options.families.split(","):
        for state in options.states.split(","):
            steps = {"random": 0, "trained": options.train_steps}[state]
            name, model = f"{FAMILIES[family]}, {state}", folder / f"{family}-{state}"
            if not (model / "tokenizer_config.json").exists():  # its last file
                make_model(model, family, steps, options)
            expected = run_part(options, model, None, model / "found-hf")
            documents[name] = expected["document"]
            for layout in options.layouts.split(";"):
                found = run_part(options, model, layout, model / f"found-{layout.replace(' ', '-')}")
                rows.append(compare(name, layout, found, expected, model, options))
                print(rows[-1], file=sys.stderr, flush=True)
    return markdown(rows, documents, options)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", required=True, help="local files of the tasks")
    add("--tokenizer-model", help="tokenizer.json")
    add("--text", help="JSON lines with a text field to train on, a pattern")
    add("--tasks", default=",".join(TASK_NAMES), help="comma-separated")
    add("--limit", type=int, help="items of each task (default: all)")
    add("--states", default="random,trained", help="weights of the models, comma-separated")
    add("--families", default=",".join(FAMILIES), help="comma-separated")
    add("--layouts", default=";".join([*LAYOUTS, HALF_BATCH]), help="separated by semicolons")
    add("--num-layers", type=int, default=4, help="of the models")
    add("--hidden-size", type=int, default=64, help="of the models")
    add("--num-attention-heads", type=int, default=4, help="of the models")
    add("--train-steps", type=int, default=100, help="of the trained models")
    add(
        "--batch-size",
        type=int,
        default=16,
        help="requests in a batch of lm-eval's backend; the target: its half x 1,024",
    )
    add("--work-dir", help="keeps what is finished, of these very options (default: a temporary folder)")
    add("--output", help="Markdown file to write; the page is printed in any case")
    for name in ("--model", "--layout", "--found"):
        add(name, help=argparse.SUPPRESS)  # of the processes that this one starts
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the study, or the part that one of its processes has; returns the exit status."""
    options = parse_arguments(arguments)
    try:
        if options.model:
            (score_layout if options.layout else score_reference)(options)
            return 0
        if not options.tokenizer_model or not options.text:
            raise ValueError("found no --tokenizer-model or no --text, expected both")
        with tempfile.TemporaryDirectory() as temporary:
            page = study(options, Path(options.work_dir or temporary))
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"evaluation_parity: {error}", file=sys.stderr)
        return 1
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(options.output, "w") as stream:
            stream.write(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

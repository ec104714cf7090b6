"""A short run in a temporary folder, where no run of a study has said yet how fast the machine is."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from megatron_bliss.config.config import Config
from megatron_bliss.config.parse import dump_yaml
from megatron_bliss.config.training import OptimizerConfig
from megatron_bliss.study.rates import Rates
from megatron_bliss.study.runs import StudyRun
from megatron_bliss.study.work import finished_work

TARGET_STEPS, PROXY_STEPS, UPPER_STEPS = 8, 4, 2
"""Of each segment of the target's training, of the proxy's warm-up, of the bilevel stage."""
LONGEST_SECONDS = 120.0
"""A probe ends by then, if it has seen the target train by then, with the stages that are done."""
_PAUSE = 0.1


def measure(run: StudyRun, control: str, launch: Callable[[Path], list[str]]) -> Rates:
    """Run ``run`` with few steps, and return what its stages took.

    control: the arm to begin with; launch: the command that makes the run of a file of options. Stages that do not
    depend on steps, such as scoring, are those of the run itself. ValueError where the short run fails.
    """
    folder = Path(tempfile.mkdtemp(prefix="study_probe_"))
    try:
        probe = dataclasses.replace(run, variant="", config=shortened(run.config, control, folder / "run"))
        options, log = folder / "options.yaml", folder / "log"
        options.write_text(dump_yaml(probe.config), encoding="utf-8")
        began = time.time()
        with open(log, "w", encoding="utf-8") as said:
            process = subprocess.Popen(launch(options), stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                _wait(process, probe, began)
            finally:
                _end(process)
        if not _has_trained(probe):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:]
            raise ValueError(
                "\n".join(lines) + f"\nfound a failure in a short run of {run.name} that measures this machine, "
                "expected it to train: mend what it says"
            )
        return Rates(finished_work(probe), [_start_seconds(probe, began)])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def shortened(config: Config, control: str, folder: Path) -> Config:
    """A run's options with few steps and constant learning rates; the control's arm first."""

    def flat(optimizer: OptimizerConfig) -> OptimizerConfig:
        return dataclasses.replace(optimizer, lr_decay_style="constant", lr_warmup_iters=0, lr_wsd_decay_iters=0)

    training, proxy, bilevel = config.pretraining, config.proxy, config.bilevel
    return dataclasses.replace(
        config,
        run_folder=str(folder),
        arms=sorted(config.arms, key=lambda arm: arm != control),
        pretraining=dataclasses.replace(
            training,
            warmup_iters=min(TARGET_STEPS, training.warmup_iters),
            train_iters=min(TARGET_STEPS, training.train_iters),
            decay_branch_iters=min(TARGET_STEPS, training.decay_branch_iters),
            optimizer=flat(training.optimizer),
        ),
        proxy=dataclasses.replace(
            proxy,
            warmup_iters=min(PROXY_STEPS, proxy.warmup_iters),
            warmup_optimizer=flat(proxy.warmup_optimizer),
        ),
        bilevel=dataclasses.replace(
            bilevel,
            upper_iters=min(UPPER_STEPS, bilevel.upper_iters),
            proxy_optimizer=flat(bilevel.proxy_optimizer),
            score_optimizer=flat(bilevel.score_optimizer),
        ),
    )


def _wait(process: subprocess.Popen, probe: StudyRun, began: float) -> None:
    """Until the run ends, or each arm has been through a round, or time is up."""
    while process.poll() is None:
        time.sleep(_PAUSE)
        through = {one.arm for one in finished_work(probe) if one.round == 1 and one.stage == "evaluate"}
        if through >= set(probe.config.arms) or (time.time() - began > LONGEST_SECONDS and _has_trained(probe)):
            return


def _has_trained(probe: StudyRun) -> bool:
    return any(one.stage == "pretrain" for one in finished_work(probe))


def _end(process: subprocess.Popen) -> None:
    """End the run with all its processes, which are a group of their own."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _start_seconds(probe: StudyRun, began: float) -> float:
    """What the run took beside its stages before the target's first step: libraries, ranks, shards."""
    done = probe.folder / "warmup" / "target" / "done.json"
    (warmup,) = (one for one in finished_work(probe) if one.place == ("shared", 0, "warmup target"))
    return max(0.0, done.stat().st_mtime - began - warmup.seconds)

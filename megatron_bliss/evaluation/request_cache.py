"""Finished requests on disk, so that an evaluation that was killed goes on, and a repeated one takes no time.

A folder of JSON files, one for every half minute of work, each written whole: {request key: [log-likelihood, greedy]}.
A key is a hash of the weights, the layout they are computed in and the request's tokens, so that many models may share
a folder. A file that cannot be read or written is warned of and costs time only.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import orjson
import torch

from megatron_bliss.base.files import atomic_file
from megatron_bliss.evaluation.backbone import Backbone
from megatron_bliss.evaluation.packing import Request

SECONDS_BETWEEN_FILES = 30.0


class RequestCache:
    """The main rank alone reads and writes; all ranks are told what it found."""

    def __init__(self, folder: Path | str, backbone: Backbone) -> None:
        self.folder, self._digest, self._replicas = Path(folder), backbone.digest().encode(), backbone.replicas
        self._device = backbone.device
        self._unsaved: dict[str, list] = {}
        self._last_file = time.monotonic()

    def key(self, request: Request) -> str:
        """Hash of the model and the request."""
        digest = hashlib.sha256(self._digest)
        for part in request:
            digest.update(len(part).to_bytes(8, "little") + np.asarray(part, dtype="<i8").tobytes())
        return digest.hexdigest()[:32]

    def find(self, requests: Sequence[Request]) -> dict[Request, tuple[float, bool]]:
        """Those of the requests that are known; collective over the world."""
        found = torch.zeros(len(requests), 3, dtype=torch.float64)  # filled on the host: one by one
        if self._replicas.is_main:
            known = self._read()
            for index, request in enumerate(requests):
                if entry := known.get(self.key(request)):
                    found[index] = torch.tensor([1.0, *entry], dtype=torch.float64)
        values = self._replicas.sum_over_world(found.to(self._device)).tolist()
        return {r: (value, greedy > 0) for r, (here, value, greedy) in zip(requests, values, strict=True) if here}

    def _read(self) -> dict[str, list]:
        known: dict[str, list] = {}
        for path in sorted(self.folder.glob("requests-*.json")):
            try:
                entries = orjson.loads(path.read_bytes()).items()
                known |= {key: [float(value), float(greedy)] for key, (value, greedy) in entries}
            except (OSError, ValueError, TypeError, AttributeError) as error:
                warnings.warn(f"{path} is no file of finished requests ({error}): remove it", stacklevel=2)
        return known

    def add(self, answers: Mapping[Request, tuple[float, bool]]) -> None:
        """Remember finished requests; they reach the disk within half a minute."""
        if not self._replicas.is_main:
            return
        self._unsaved |= {self.key(request): [value, int(greedy)] for request, (value, greedy) in answers.items()}
        if time.monotonic() - self._last_file >= SECONDS_BETWEEN_FILES:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        self._last_file = time.monotonic()
        if not self._unsaved:
            return
        content, self._unsaved = orjson.dumps(self._unsaved), {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.folder / f"requests-{hashlib.sha256(content).hexdigest()[:16]}.json") as stream:
                stream.write(content)
        except OSError as error:
            warnings.warn(f"finished requests were not saved in {self.folder} ({error})", stacklevel=2)

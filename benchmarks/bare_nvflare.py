"""NVFlare alone, for benchmarks/engines.py: its own job and its own collab calls, bodies as bytes, nothing of fedtailor."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

from nvflare.collab import collab


class BareServer:
    """A job of NVFlare alone: trivial calls, then one with a large body, each to all silos at once."""

    def __init__(self, spec: str = "") -> None:
        self.spec = spec  # hex of JSON: NVFlare puts its own values in the place of braces

    @collab.main
    def run(self) -> None:
        given = json.loads(bytes.fromhex(self.spec))
        took = [self.seconds(b"") for _ in range(given["repeats"] + 1)][1:]  # the first pays for warming up
        found = {"trivial": statistics.median(took), "large": self.seconds(os.urandom(given["bytes"]))}
        Path(given["file"]).write_text(json.dumps(found))

    def seconds(self, body: bytes) -> float:
        began = time.perf_counter()
        sizes = [len(came) for _, came in collab.clients(blocking=False, timeout=600.0).echo(body)]
        assert sizes == [len(body)] * len(collab.clients), sizes
        return time.perf_counter() - began


class BareSilo:
    @collab.publish
    def echo(self, body: bytes) -> bytes:
        return body

"""NVFlare alone, for benchmarks/engines.py: its own job and its own collab calls, bodies as bytes, nothing of fedtailor."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

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


def permit(kits: Path) -> None:
    """These two classes, in the kits of this measurement alone."""
    for kit in kits.iterdir():
        if (kit / "local").is_dir():
            file = kit / "local" / "resources.json"
            table = json.loads(file.read_text())
            table["class_allow_list"] += ["bare_nvflare.BareServer", "bare_nvflare.BareSilo"]
            file.write_text(json.dumps(table))


def measured(kits: Path, silos: tuple[str, ...], repeats: int, size: int) -> dict[str, Any]:
    """Submits the job to the federation that runs over these kits, and waits for its end."""
    from fedtailor.engines import nvflare_admin

    file = kits / "server" / "bare.json"
    spec = json.dumps({"file": str(file), "repeats": repeats, "bytes": size}).encode().hex()
    job = kits / "job" / "fedtailor"
    for name, table in nvflare_admin.job("0" * 16, silos).items():
        if "config_fed_server" in name:
            table["components"][0].update(path="bare_nvflare.BareServer", args={"spec": spec})
        elif "config_fed_client" in name:
            table["components"][0].update(path="bare_nvflare.BareSilo")
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text(json.dumps(table))
    submitted = False
    while not submitted:
        with contextlib.suppress(Exception), contextlib.closing(nvflare_admin.login(kits / "server")) as session:
            if len(nvflare_admin.connected(session)) == len(silos):
                session.submit_job(str(job))
                submitted = True
        time.sleep(1)
    while not file.exists():
        time.sleep(0.5)
    return dict(json.loads(file.read_text()))

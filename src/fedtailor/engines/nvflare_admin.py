"""The one admin of a federation over NVFlare: sees who is connected, submits the job. Its identity lies in the server's kit."""

from __future__ import annotations

import contextlib
import json
import logging
import operator
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtailor.engines import nvflare_kit
from fedtailor.errors import FedtailorError

LOOK = 2.0  # seconds between two looks at who is connected
STALE = 15.0  # seconds after which a look tells nothing any more
FRESH = 35.0  # seconds after a silo's last sign of life (it gives one every 10) that it still counts as connected
GATHER = 20.0  # seconds that a new job waits for silos that are not there yet
PATIENCE = {"sync_task_timeout": 20}  # seconds in which every member of a new job must be ready


class Lost(FedtailorError):
    """The job, or the engine's server, is not there."""


@dataclass(frozen=True)
class Seen:
    token: str  # another one each time that a silo comes to the server
    seen: float  # when it last gave a sign of life


@dataclass
class Admin:
    """Our one admin at the engine's server: looks who is connected, submits jobs. What fails is tried again with a new login."""

    kit: Path
    _session: Any = None
    _look: tuple[Mapping[str, Seen], float] = ({}, 0.0)  # what the last look found, and when it was
    _since: float = 0.0  # since when the server has been seen with a silo at it
    _why: str = "the engine's server was not reached yet"

    def __post_init__(self) -> None:
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._ending: set[str] = set()
        self._watching = threading.Thread(target=self._watch, daemon=True)
        self._watching.start()

    def here(self) -> dict[str, Seen] | None:
        """Silos that are connected, by the last look; None where there was none lately."""
        found, when = self._look
        if time.time() - when > STALE:
            return None
        return {silo: one for silo, one in found.items() if when - one.seen < FRESH}

    def gathered(self, silos: Sequence[str], end: float) -> dict[str, Seen]:
        """Those connected, all of them if they come soon. Raises Lost when none comes in time."""
        while time.monotonic() < end:
            here = {silo: one for silo, one in (self.here() or {}).items() if silo in silos}
            if len(here) == len(silos) or (here and time.monotonic() - self._since > GATHER):
                return here
            time.sleep(0.1)
        raise Lost(self._why)

    def submit(self, number: str, silos: Sequence[str]) -> str:
        with tempfile.TemporaryDirectory(dir=self.kit, prefix="job-") as folder:
            for name, table in job(number, silos).items():
                file = Path(folder) / "fedtailor" / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(table), encoding="utf-8")
            return str(self._call(operator.methodcaller("submit_job", str(Path(folder) / "fedtailor"))))

    def status(self, job: str) -> str:
        return str(self._call(operator.methodcaller("get_job_meta", job)).get("status", ""))

    def end(self, job: str) -> None:
        """Without it, NVFlare keeps a job for 15 minutes more where one of its members has died."""
        self._ending.add(job)

    def close(self) -> None:
        self._closed.set()
        self._watching.join(20)
        with contextlib.suppress(Lost):
            self._abort()
        with self._lock:
            self._leave()

    def _abort(self) -> None:
        while self._ending:
            job = self._ending.pop()
            with contextlib.suppress(Lost):  # it has ended already, or the server does not know it any more
                self._call(operator.methodcaller("abort_job", job))

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                here = self._call(connected)
                self._since = self._since if self._since and here else time.monotonic()
                self._look, self._why = (here, time.time()), "no silo is connected to the server"
                self._abort()
            except Lost as error:
                self._why = str(error)
            self._closed.wait(LOOK)

    def _call(self, what: Callable[[Any], Any]) -> Any:
        with self._lock:
            try:
                if self._session is None:
                    self._session = login(self.kit)
                return what(self._session)
            except Exception as error:
                if type(error).__name__ in ("JobNotFound", "JobNotRunning"):
                    raise Lost(str(error)) from error
                self._leave()  # whatever it was: the next call logs in anew, and what was seen before it counts no more
                self._look, self._since = ({}, 0.0), 0.0
                raise Lost(f"the engine's server does not answer ({str(error)[:200]}); is `fedtailor server` running?") from error

    def _leave(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            with contextlib.suppress(Exception):
                session.close()


def login(kit: Path) -> Any:
    from nvflare.fuel.flare_api.flare_api import Session

    logging.getLogger("nvflare").setLevel(logging.CRITICAL)  # what fails is told by us, in one line
    session = Session(nvflare_kit.ADMIN, str(kit / "admin"))
    session.api._print_hci = lambda *_: None  # it would print to the program's output
    session.api.auto_login_max_tries = 1
    try:
        session.try_connect(5.0)
    except BaseException:
        with contextlib.suppress(Exception):
            session.close()
        raise
    return session


def look(kit: Path) -> dict[str, Seen]:
    """Who is connected to the server of this kit now. Raises Lost when the server does not answer."""
    try:
        session = login(kit)
    except Exception as error:  # NVFlare raises many kinds
        raise Lost(f"the engine's server does not answer ({str(error)[:200]}); is `fedtailor server` running?") from error
    with contextlib.closing(session):
        return connected(session)


def connected(session: Any) -> dict[str, Seen]:
    """Silos by name. The session's own call leaves out the token, which only the table for people shows."""
    told = session._do_command("check_status server")
    rows = [row for part in told["data"] if part.get("type") == "table" for row in part["rows"]]
    tokens = {row[0]: row[4] for row in rows if len(row) == 6}
    found = told["meta"].get("clients") or ()
    return {s["client_name"]: Seen(tokens[s["client_name"]], float(s["client_last_conn_time"])) for s in found}


def job(number: str, silos: Sequence[str]) -> dict[str, Any]:
    """All that is submitted: three tables, no code. Only classes on the allow-lists of the kits are named."""
    (server_end, controller), (silo_end, executor) = nvflare_kit.CLASSES["server"], nvflare_kit.CLASSES["silo"]
    spec = json.dumps({"job": number}).encode().hex()
    filters: dict[str, Any] = {"task_data_filters": [], "task_result_filters": []}
    return {
        "meta.json": {
            "name": "fedtailor",
            "resource_spec": {},
            "min_clients": 1,
            "deploy_map": {"app": ["server", *silos]},
        },
        "app/config/config_fed_server.json": {
            "format_version": 2,
            "workflows": [{"id": "controller", "path": controller, "args": {"server_obj_id": "_server", **PATIENCE}}],
            "components": [{"id": "_server", "path": server_end, "args": {"spec": spec}}],
            **filters,
        },
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [{"tasks": ["*"], "executor": {"path": executor, "args": {"client_obj_id": "_client"}}}],
            "components": [{"id": "_client", "path": silo_end, "args": {}}],
            **filters,
        },
    }

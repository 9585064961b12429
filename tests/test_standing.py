"""What a run over a federation last knew: heads alone are looked at, and the file is there while the run goes on."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from background import wait_for
from commands import LABELLED, PROCESS, SLIM, TINY, Command
from fedtailor.engines import standing
from fedtailor.engines.courier import Answer, Head
from fedtailor.errors import UserError

OPENED = {"kind": "opened", "fedtailor": "0.1.0", "torch": "2.9.0", "model_sha256": "a" * 64}


@dataclass
class Told:
    """A courier whose silos say what they are told to."""

    heads: dict[str, Head]
    silos: tuple[str, ...] = ("north", "south")
    given_up: list[str] = field(default_factory=list)

    def __enter__(self) -> Told:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def exchange(self, to: Sequence[str], head: Head, body: bytes, timeout: float) -> Iterator[Answer]:
        try:
            for silo in to:
                said = self.heads[silo]
                yield Answer(silo, said, body, str(said.get("lost", "")))
        finally:
            self.given_up.append("closed")


def noted(kit: Path, told: Told) -> standing.Noted:
    return standing.Noted(told, kit, str(kit / "runs" / "x"), 4, "a" * 64)


def ask(number: int) -> dict[str, Any]:
    return {"kind": "ask", "run": "ab12/tiny/federated/0", "round": number, "index": 0, "work": "x:y", "committed": 0}


def lines(kit: Path, connected: Any = None) -> list[str]:
    """How many seconds ago is N here."""
    said = standing.lines(kit, ("north", "south"), connected)
    return [re.sub(r"\d+ s (ago)|for \d+ s", lambda found: "N s ago" if found[1] else "for N s", line) for line in said]


def test_what_passes_is_handed_on_as_it_is(tmp_path: Path) -> None:
    told = Told({"north": OPENED, "south": {"lost": "away"}})
    with noted(tmp_path, told) as one:
        assert one.silos == told.silos
        assert [(a.silo, a.body, a.lost) for a in one.exchange(("north", "south"), {"kind": "open"}, b"12", 1.0)] == [
            ("north", b"12", ""), ("south", b"12", "away"),
        ]  # fmt: skip


def test_an_exchange_that_is_given_up_is_given_up_below_too(tmp_path: Path) -> None:
    told = Told({"north": OPENED, "south": OPENED})
    with noted(tmp_path, told) as one:
        stream = one.exchange(("north", "south"), {"kind": "open"}, b"", 1.0)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert told.given_up == ["closed"]


def test_status_tells_the_round_the_versions_and_who_is_missing(tmp_path: Path) -> None:
    told = Told({"north": OPENED, "south": {"kind": "refused", "why": "another fedtailor"}})
    with noted(tmp_path, told) as one:
        list(one.exchange(("north", "south"), {"kind": "open"}, b"", 1.0))
        told.heads = {"north": {"kind": "reply"}, "south": {"lost": "no reply within 5 s"}}
        list(one.exchange(("north",), ask(2), b"", 1.0))
        assert wait_for(lambda: (standing.read(tmp_path) or {}).get("round") == 2, 10), "written while the run goes on"
        said = lines(tmp_path, {"north": time.time() - 3})
        assert said[0] == f"run {tmp_path}/runs/x: federated, round 2 of 4 for N s; begun N s ago"
        assert said[1] == "north: last seen N s ago, fedtailor 0.1.0, torch 2.9.0, last answer N s ago"
        assert said[2] == "south: not connected, last answer N s ago, missing N s ago: another fedtailor"
        list(one.exchange(("south",), ask(3), b"", 1.0))
    assert lines(tmp_path)[2] == "south: connection not known, last answer N s ago, missing N s ago: no reply within 5 s"
    assert lines(tmp_path)[0] == f"run {tmp_path}/runs/x: finished N s ago"


def test_a_silo_with_another_base_is_named(tmp_path: Path) -> None:
    told = Told({"north": OPENED | {"model_sha256": "b" * 64}, "south": OPENED})
    with noted(tmp_path, told) as one:
        list(one.exchange(("north", "south"), {"kind": "open"}, b"", 1.0))
    assert "cannot take part: its base model is another one (sha256 bbbbbbbbbbbb)" in lines(tmp_path)[1]
    assert "cannot take part" not in lines(tmp_path)[2]
    with noted(tmp_path, told):
        assert "cannot take part" not in lines(tmp_path)[1], "that was another run's"
        assert "fedtailor 0.1.0" in lines(tmp_path)[1], "which is not"


def test_a_run_that_failed_says_how_to_go_on(tmp_path: Path) -> None:
    told = Told({"north": OPENED, "south": OPENED})
    one = noted(tmp_path, told).__enter__()
    list(one.exchange(("north",), ask(1), b"", 1.0))
    one.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    said = lines(tmp_path)[0]
    assert said.endswith(
        f"stopped (federated, round 1 of 4); go on with: fedtailor run --resume {tmp_path}/runs/x --federation {tmp_path}"
    )


def test_it_is_written_at_most_every_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    monkeypatch.setattr("fedtailor.wire.write_bytes", lambda path, data: written.append(data))
    told = Told({"north": {"kind": "reply"}, "south": {"kind": "reply"}})
    began = time.monotonic()
    with noted(tmp_path, told) as one:
        for number in range(300):
            list(one.exchange(("north", "south"), ask(number), b"", 1.0))
    assert len(written) <= 3 + (time.monotonic() - began) / standing.EVERY
    assert json.loads(written[-1])["round"] == 299


def test_a_folder_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    told = Told({"north": OPENED, "south": OPENED})
    with noted(tmp_path / "gone", told) as one:
        assert len(list(one.exchange(("north", "south"), ask(1), b"", 1.0))) == 2


def test_nothing_known_and_a_damaged_file(tmp_path: Path) -> None:
    assert lines(tmp_path) == ["no run yet", "north: connection not known", "south: connection not known"]
    (tmp_path / standing.FILE).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        lines(tmp_path)


def test_reading_does_without_torch() -> None:
    import subprocess

    code = "import sys, fedtailor.engines.standing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([*PROCESS[:2], code], env=SLIM, check=False).returncode == 0


def test_a_run_over_sockets_leaves_its_standing(fedtailor: Command, tmp_path: Path) -> None:
    """The same from Python and from the command line: `fedtailor.run(..., federation=KIT)`."""
    import fedtailor as library
    from background import Background

    names = ("cafe", "clinic", "shop")
    short = Path("/tmp") / f"ft-{tmp_path.name[:20]}-{time.monotonic_ns() % 10**6}"
    short.mkdir(mode=0o700)
    try:
        with Background(short) as running:
            for name in names:
                (short / f"{name}.toml").write_text(f'name = "{name}"\nfolder = "{name}"\nserver_names_data = true\n')
                running.start("silo", "--config", f"{name}.toml")
            sockets = [f'{name} = "{name}/worker.sock"' for name in names]
            (short / "federation.toml").write_text("\n".join(['engine = "sockets"', "[silos]", *sockets]))
            assert wait_for(lambda: all((short / name / "worker.sock").exists() for name in names), 60)
            sets = [LABELLED, "engine.cohort=1", 'rows=["federated"]']
            result = library.run(TINY, sets, out=tmp_path / "afar", federation=short)
        known = standing.read(short)
        assert known is not None
        assert (known["run"], known["rounds"], known["at"]) == (str(tmp_path / "afar"), 2, "test/0")
        assert sorted(known["silos"]) == list(names)
        assert all(one["answered"] > known["since"] and "lost" not in one for one in known["silos"].values())
        for one in known["silos"].values():
            assert (one["fedtailor"], one["torch"]) == (library.__version__, torch.__version__)
            assert one["model_sha256"] == known["model_sha256"]
        here = library.run(TINY, sets, out=tmp_path / "here")
        assert result["rows"]["federated"]["accuracy"] == here["rows"]["federated"]["accuracy"]
    finally:
        import shutil

        shutil.rmtree(short)

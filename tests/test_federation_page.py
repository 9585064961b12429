"""docs/federation.md, walked through from top to bottom as a reader would: every command runs, in order, in one folder.

What differs from the page: the server's name is this machine's, and the base model is a tiny one.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest

from background import Background, free_port, left, wait_for
from commands import PROCESS, SLIM
from test_experiments import spans

pytest.importorskip("nvflare", reason="NVFlare is not installed: pip install 'fedtailor[nvflare]'")

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "federation.md").read_text(encoding="utf-8")
ELSEWHERE = ("pip install", "fedtailor models fetch")  # .ci/run does both before any test
STAY = ("server", "silo")  # commands that run until they are stopped


def blocks() -> list[tuple[str, str]]:
    """(language, text) of every fenced block before the first section on another engine."""
    return re.findall(r"^```(\w*)\n(.*?)^```", PAGE.partition("\n## Over Flower")[0], flags=re.M | re.S)


def commands() -> list[str]:
    return [line for language, text in blocks() if not language for line in text.splitlines()]


def rows(names: tuple[str, str]) -> list[dict[str, str]]:
    words = (("pain in the chest", "high"), ("a form to sign", "low"))
    return [dict(zip(names, (f"{words[i % 2][0]} {i}", words[i % 2][1]), strict=True)) for i in range(40)]


def hospitals(folder: Path) -> None:
    """Rows as the page's three hospitals have them."""
    plain = rows(("text", "urgency"))
    (folder / "visits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in plain))
    with (folder / "visits.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, ("text", "urgency"))
        table.writeheader()
        table.writerows(plain)
    (folder / "kits" / "west" / "visits.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(("note", "triage"))))


def answers(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.engines
def test_the_page_from_top_to_bottom(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, port, said = tmp_path_factory.mktemp("f"), free_port(), {}
    with Background(folder) as running:
        for language, text in blocks():
            if language == "toml":
                name = text.splitlines()[0].removeprefix("# ")
                (folder / name).write_text(text.replace('"smollm2-135m"', '"tiny"'), encoding="utf-8")
            for line in text.splitlines() if not language else ():
                if line.startswith(ELSEWHERE):
                    continue
                words = shlex.split(line.replace("fl.example.org:8002", f"localhost:{port}"))
                if words[:2] in [["fedtailor", stay] for stay in STAY]:
                    running.start(*words[1:])
                    ready = folder / words[2] / "silo" / "worker.sock"
                    up = wait_for(lambda w=words, r=ready: answers(port) if w[1] == "server" else r.exists(), 90)
                    assert up, running.log(" ".join(words[1:])).read_text()
                    continue
                given = [*PROCESS, *words[1:]] if words[0] == "fedtailor" else words
                done = subprocess.run(given, cwd=folder, env=SLIM, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, (line, done.stdout, done.stderr)
                said[line] = done.stdout
                if "federation init" in line:
                    hospitals(folder)
    assert left(folder) == []
    status = next(text for line, text in said.items() if " status " in line)
    assert re.findall(r"^(\w+): last seen", status, flags=re.M) == ["north", "south", "west"]
    result = json.loads((folder / "runs" / "urgency" / "result.json").read_text())
    assert sorted(result["rows"]["federated"]["accuracy"]["per_silo"]) == ["north", "south", "west"]
    assert (folder / "runs" / "urgency" / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "north.tar.gz").is_file()


def test_what_the_page_leaves_to_others_is_done_there() -> None:
    ci = (ROOT / ".ci" / "run").read_text() + (ROOT / "Makefile").read_text()
    assert all(line in ci for line in commands() if line.startswith("fedtailor models fetch"))


def test_a_command_within_a_line_is_one_of_those_that_run() -> None:
    run = [shlex.split(line)[1:] for line in commands() if line.startswith("fedtailor ")]
    for span in spans(PAGE.partition("\n## Over Flower")[0]):
        if span.startswith("fedtailor "):
            words = [word for word in shlex.split(span)[1:] if not word.isupper()]
            assert any(all(word in line for word in words) for line in run), span


def test_the_page_is_short_and_its_tables_are_files_by_name() -> None:
    assert len(PAGE.partition("\n## Over Flower")[0].splitlines()) <= 120
    for language, text in blocks():
        if language == "toml":
            assert re.match(r"# [\w/]+\.toml\n", text)
            tomllib.loads(text)

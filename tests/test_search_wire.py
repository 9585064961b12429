"""No row of any silo, nor eight words of one in a row, is in any message: read from the recorded bytes of a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtailor import experiment, runs
from fedtailor.data import load

WORDS = 8
METHODS: dict[str, list[str]] = {
    "search": ['method={name="search", calls=30, proposals=4, examples=[["All was calm.", "good"], ["All was lost.", "bad"]]}'],
    "noisy": ['method={name="search", calls=30, proposals=4, noise="laplace"}'],
    "blackbox": ['method={name="blackbox", virtual_tokens=4, dimensions=8, generations=1, batch_size=4}'],
    "losses": ['method={name="blackbox", virtual_tokens=4, dimensions=8, batch_size=4, share="losses"}'],
}


def long_rows(folder: Path) -> Path:
    """Rows of a dozen words and more, as an 8-gram needs."""
    lines = []
    for i in range(60):
        words = " ".join(f"w{(i * 7 + k * k) % 97}x{k}" for k in range(12 + i % 3))
        lines.append(json.dumps({"site": f"site-{i % 3}", "text": words, "mood": ("bad", "good")[i % 2]}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def escaped(text: str) -> bytes:
    """As it stands in a message: JSON within the JSON of a header."""
    return json.dumps(json.dumps(text)[1:-1])[1:-1].encode()


@pytest.mark.parametrize("name", METHODS)
def test_no_row_is_in_any_message(name: str, tmp_path: Path, tiny_experiment: Any) -> None:
    source = long_rows(tmp_path)
    asked = tiny_experiment(
        f'data.source="{source}"', "engine.record=true", 'rows=["federated"]', "engine.cohort=1", *METHODS[name]
    )
    runs.begin(asked, tmp_path / "run", "a test").conduct()
    messages = sorted((tmp_path / "run" / "messages").glob("*.safetensors"))
    assert {file.name.split("-")[1] for file in messages} == {"up", "down"}
    whole = b"\n".join(file.read_bytes() for file in messages)
    rows = load(asked.data, {}, 0).silos
    checked = 0
    for silo in rows.values():
        for row in (*silo.train, *silo.val, *silo.test):
            words = row.input.split()
            assert len(words) >= WORDS
            for i in range(len(words) - WORDS + 1):
                checked += 1
                for joined in (" ".join(words[i : i + WORDS]), "".join(words[i : i + WORDS])):
                    assert joined.encode() not in whole
            assert escaped(row.prompt) not in whole
            assert escaped(row.id) not in whole
    assert checked > 200


def test_the_check_can_fail(tmp_path: Path) -> None:
    """A row written into a message is found: text crosses as it is, in JSON."""
    from fedtailor import wire
    from fedtailor.proposing import Written

    text = long_rows(tmp_path).read_text().splitlines()[0].split('"text": "')[1].split('"')[0]
    prompt = f'{text}\nMood "of ten":'
    message = wire.pack(Written((f"so: {prompt}",)))
    assert " ".join(text.split()[2 : 2 + WORDS]).encode() in message
    assert prompt.encode() not in message, "a line's end crosses as two letters, and that twice"
    assert escaped(prompt) in message


@pytest.fixture
def tiny_experiment() -> Any:
    from tiny_runs import TINY

    def made(*sets: str) -> experiment.Experiment:
        return experiment.load(TINY, ["engine.threads=1", *sets])

    return made

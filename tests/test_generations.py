"""Server state and silo memories are one generation: old or new whole, wherever a kill may fall."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import wire
from fedtailor.generations import Best, Generation, Generations
from fedtailor.wire import WireError

wire.allow(__name__)


@dataclass(frozen=True)
class State:
    tensors: dict[str, torch.Tensor]


class Killed(BaseException):
    """What no handler of failures may catch."""


def state(number: int) -> State:
    return State({"w": torch.full((3,), float(number))})


def memory(number: int) -> dict[str, Any]:
    return {"moments": {"m": torch.tensor([number / 3])}, "step": number}


def log(number: int) -> list[dict[str, Any]]:
    return [{"round": n, "seconds": n / 7} for n in range(number + 1)]


def commit(kept: Generations, number: int, silos: str = "abc", best: int | None = None) -> None:
    """Round `number` as it was, with these silos in it, and round `best` the best so far."""
    told = None if best is None else Best(best, best / 10, state(best))
    kept.commit(number, state(number), {silo: memory(number) for silo in silos}, told, log(number))


def seen(kept: Generations) -> Any:
    """Everything of the newest generation, as plain values."""
    found = kept.newest()
    if found is None:
        return None
    generation, memories, best = found
    return (
        generation.round,
        generation.state.tensors["w"].tolist(),
        {silo: (m["step"], m["moments"]["m"].item()) for silo, m in memories.items()},
        None if best is None else (best.round, best.value, best.state.tensors["w"].tolist()),
        generation.log,
    )


def expected(number: int, steps: dict[str, int], best: int | None) -> Any:
    return (
        number,
        [float(number)] * 3,
        {silo: (n, torch.tensor(n / 3).item()) for silo, n in steps.items()},
        None if best is None else (best, best / 10, [float(best)] * 3),
        log(number),
    )


def files(folder: Path) -> set[str]:
    return {file.name for file in (folder / "state").iterdir()}


def test_there_is_nothing_before_the_first_commit(tmp_path: Path) -> None:
    assert Generations(tmp_path).newest() is None


def test_the_newest_is_what_was_committed_last(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    commit(kept, 0, "")
    assert seen(Generations(tmp_path)) == expected(0, {}, None)
    commit(kept, 1, "abc", best=1)
    commit(kept, 2, "abc", best=1)
    assert seen(Generations(tmp_path)) == expected(2, {"a": 2, "b": 2, "c": 2}, 1)


def test_silos_that_took_no_part_keep_their_memory_and_its_file(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    commit(kept, 1, "abc")
    before = {file: (tmp_path / "state" / file).stat() for file in files(tmp_path)}
    commit(kept, 2, "b")
    assert seen(Generations(tmp_path)) == expected(2, {"a": 1, "b": 2, "c": 1}, None)
    same = [f for f in before if f in files(tmp_path) and (tmp_path / "state" / f).stat() == before[f]]
    assert len(same) == 2, "the files of a and c are the very same"


def test_memories_survive_being_read_again_between_commits(tmp_path: Path) -> None:
    commit(Generations(tmp_path), 1, "abc", best=1)
    again = Generations(tmp_path)
    again.newest()
    commit(again, 2, "c", best=1)
    assert seen(Generations(tmp_path)) == expected(2, {"a": 1, "b": 1, "c": 2}, 1)


def test_a_silo_that_forgets_has_no_file(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    commit(kept, 1, "ab")
    kept.commit(2, state(2), {"a": {}}, None, log(2))
    assert seen(Generations(tmp_path)) == expected(2, {"b": 1}, None)
    assert len(files(tmp_path)) == 2  # the generation, and b's


def test_files_that_nobody_names_are_swept(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    commit(kept, 1, "ab", best=1)
    (tmp_path / "state" / ".generation.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "state" / "memory-9-0.safetensors").write_bytes(b"of a round that did not happen")
    commit(kept, 2, "ab", best=2)
    named = kept.newest()
    assert named is not None
    assert files(tmp_path) == {"generation.safetensors", named[0].best, *named[0].memories.values()}
    assert len(files(tmp_path)) == 4


def test_silos_with_names_that_are_no_file_names(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    names = ["a/b", "..", "", "é" * 300, "memory-1-0"]
    kept.commit(1, state(1), {name: memory(i) for i, name in enumerate(names)}, None, log(1))
    found = Generations(tmp_path).newest()
    assert found is not None
    assert {name: m["step"] for name, m in found[1].items()} == {name: i for i, name in enumerate(names)}


def test_the_log_of_rounds_is_one_line_each(tmp_path: Path) -> None:
    commit(Generations(tmp_path), 2, "")
    assert [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()] == log(2)


def test_a_damaged_generation_is_named(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    commit(kept, 1)
    kept.file.write_bytes(kept.file.read_bytes()[:-4])
    with pytest.raises(WireError, match=r"generation\.safetensors: "):
        Generations(tmp_path).newest()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts file writes, and kills at the one asked for: before it, or in its midst."""
    count = {"now": 0, "kill": 0, "midst": 0}
    real = wire.write_bytes

    def write(path: Path, data: bytes) -> None:
        count["now"] += 1
        if count["now"] == count["kill"]:
            if count["midst"]:  # what a SIGKILL leaves: part of a file, beside
                path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])
            raise Killed
        real(path, data)

    monkeypatch.setattr(wire, "write_bytes", write)
    return count


@pytest.mark.parametrize("midst", [0, 1])
def test_a_kill_at_any_write_leaves_the_old_or_the_new_whole(tmp_path: Path, calls: dict[str, int], midst: int) -> None:
    old, new = expected(1, {"a": 1, "b": 1, "c": 1}, 1), expected(2, {"a": 2, "b": 1, "c": 2}, 2)
    outcomes = []
    for kill in range(1, 100):
        folder = tmp_path / str(kill)
        kept = Generations(folder)
        calls.update(kill=0, midst=midst)
        commit(kept, 1, "abc", best=1)
        calls.update(now=0, kill=kill)
        try:
            commit(kept, 2, "ac", best=2)
            whole = True
        except Killed:
            whole = False
        calls["kill"] = 0
        after = Generations(folder)
        outcomes.append(seen(after))
        assert outcomes[-1] in (old, new)
        assert [json.loads(line) for line in after.log.read_text().splitlines()] == outcomes[-1][-1]
        if outcomes[-1] == old:  # the round is run again, and all is as if nothing had been
            commit(after, 2, "ac", best=2)
        commit(after, 3, "b", best=2)
        assert seen(Generations(folder)) == expected(3, {"a": 2, "b": 3, "c": 2}, 2)
        assert len(files(folder)) == 5  # the generation, the best, three memories
        if whole:
            break
    # two memories, the best, the generation itself; then the log, which comes after the commit
    assert outcomes == [old] * 4 + [new] * 2


def test_a_kill_in_the_sweep_leaves_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Generations(tmp_path)
    commit(kept, 1, "abc", best=1)
    real = Path.unlink
    swept: list[str] = []

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if swept:
            raise Killed
        swept.append(path.name)
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(Killed):
        commit(kept, 2, "ab", best=2)
    monkeypatch.undo()
    assert swept
    assert seen(Generations(tmp_path)) == expected(2, {"a": 2, "b": 2, "c": 1}, 2)
    commit(kept, 3, "", best=2)
    assert len(files(tmp_path)) == 5


def test_a_generation_holds_what_names_its_files(tmp_path: Path) -> None:
    commit(Generations(tmp_path), 1, "ab", best=1)
    found: Generation = wire.read_file(tmp_path / "state" / "generation.safetensors")
    for name in (*found.memories.values(), found.best):
        assert (tmp_path / "state" / name).is_file()

"""Server state and silo memories are one generation: old or new whole, wherever a kill may fall."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor import wire
from fedtailor.errors import UserError
from fedtailor.generations import Best, Generation, Generations

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
    told = None if best is None else Best(best, {"a": best / 10}, state(best))
    kept.commit(number, state(number), {silo: memory(number) for silo in silos}, told, log(number))


def seen(kept: Generations) -> Any:
    """Everything of the newest generation, as plain values."""
    found = kept.newest()
    if found is None:
        return None
    best = found.best
    return (
        found.round,
        found.state.tensors["w"].tolist(),
        {silo: (m["step"], m["moments"]["m"].item()) for silo, m in found.memories.items()},
        None if best is None else (best.round, best.per_silo["a"], best.state.tensors["w"].tolist()),
        found.log,
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

    def written(file: str) -> tuple[int, int]:  # not when it was read: `seen` does
        found = (tmp_path / "state" / file).stat()
        return found.st_ino, found.st_mtime_ns

    before = {file: written(file) for file in files(tmp_path)}
    commit(kept, 2, "b")
    assert seen(Generations(tmp_path)) == expected(2, {"a": 1, "b": 2, "c": 1}, None)
    same = [f for f in before if f in files(tmp_path) and written(f) == before[f]]
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
    named: Generation = wire.read_file(kept.file)
    assert files(tmp_path) == {"generation.safetensors", named.best, *named.memories.values()}
    assert len(files(tmp_path)) == 4


def test_silos_with_names_that_are_no_file_names(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    names = ["a/b", "..", "", "é" * 300, "memory-1-0"]
    kept.commit(1, state(1), {name: memory(i) for i, name in enumerate(names)}, None, log(1))
    found = Generations(tmp_path).newest()
    assert found is not None
    assert {name: m["step"] for name, m in found.memories.items()} == {name: i for i, name in enumerate(names)}


def test_the_log_of_rounds_is_one_line_each(tmp_path: Path) -> None:
    commit(Generations(tmp_path), 2, "")
    assert [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()] == log(2)


def test_a_damaged_generation_is_named(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    commit(kept, 1)
    kept.file.write_bytes(kept.file.read_bytes()[:-4])
    with pytest.raises(UserError, match=r"state: damaged .*generation\.safetensors: .*; delete .* to train that row anew"):
        Generations(tmp_path).newest()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts file writes, and kills at the one asked for: before it, or in its midst."""
    count = {"now": 0, "kill": 0, "midst": 0}
    real = wire.write_file

    def write(path: Path, body: Any) -> int:
        count["now"] += 1
        if count["now"] == count["kill"]:
            if count["midst"]:  # what a SIGKILL leaves: part of a file, beside
                path.with_name(f".{path.name}.tmp").write_bytes(wire.pack(body)[:100])
            raise Killed
        return real(path, body)

    monkeypatch.setattr(wire, "write_file", write)
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
    # two memories, the best, (the log,) the generation itself, which is the commit
    assert outcomes == [old] * 4 + [new]


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


def test_a_log_is_appended_to_and_never_written_anew(tmp_path: Path) -> None:
    kept = Generations(tmp_path)
    commit(kept, 1)
    inode, size = (tmp_path / "rounds.jsonl").stat().st_ino, (tmp_path / "rounds.jsonl").stat().st_size
    commit(kept, 2)
    after = (tmp_path / "rounds.jsonl").stat()
    assert after.st_ino == inode
    assert after.st_size > size
    header = (tmp_path / "state" / "generation.safetensors").read_bytes()
    assert b"seconds" not in header, "the log is not in the generation too"


def test_what_a_killed_commit_logged_is_cut_off(tmp_path: Path) -> None:
    commit(Generations(tmp_path), 1)
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(b'{"round": 2, "half a li')
    assert seen(Generations(tmp_path))[-1] == log(1)
    assert [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()] == log(1)


@pytest.mark.parametrize("gone", ["rounds.jsonl", "state/best-1.safetensors"])
def test_a_lost_file_is_named_with_what_to_do(tmp_path: Path, gone: str) -> None:
    commit(Generations(tmp_path), 1, best=1)
    (tmp_path / gone).unlink()
    with pytest.raises(UserError, match=rf"damaged .*{gone.rpartition('/')[2]}.*; delete .* to train that row anew"):
        Generations(tmp_path).newest()

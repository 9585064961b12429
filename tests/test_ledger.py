"""What was asked is kept, and the limits with it: over restarts, threads, processes and clocks that are set back."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.errors import SiloError, UserError
from fedtailor.retrieval.ledger import DAY, HOUR, Ledger, Left
from fedtailor.retrieval.policy import Policy

THREE = Policy(questions_per_hour=3, questions_per_hour_all=5, words_per_day=100)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "north.index.asked"


def booked(path: Path) -> list[tuple[float, str, int, int]]:
    with sqlite3.connect(path) as db:
        return db.execute("select at, asker, questions, words from taken order by rowid").fetchall()


def test_an_hour_slides(path: Path) -> None:
    """Of 3 an hour asked at 0, 600 and 1200 s, the next is free at 3600."""
    with Ledger(path) as ledger:
        for now in (0, 600, 1200):
            ledger.take(THREE, "ann", now, questions=1)
        with pytest.raises(
            SiloError, match=r"^\[documents\] questions_per_hour = 3 for 'ann': 1 more questions would pass it; "
            r"free again in 1600 seconds, at 1970-01-01 01:00:00 UTC$",
        ):  # fmt: skip
            ledger.take(THREE, "ann", 2000, questions=1)
        with pytest.raises(SiloError, match="in 2200 seconds, at 1970-01-01 01:10:00 UTC"):
            ledger.take(THREE, "ann", 2000, questions=2)
        assert [at for at, *_ in booked(path)] == [0, 600, 1200], "what is refused is not booked"
        with pytest.raises(SiloError):
            ledger.take(THREE, "ann", 3599.9, questions=1)
        ledger.take(THREE, "ann", 3600, questions=1)


def test_askers_have_each_their_own_limit_and_one_together(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.take(THREE, "ann", 0, questions=3)
        ledger.take(THREE, "bob", 60, questions=2)
        assert ledger.left(THREE, "cid", 60) == Left(0, 100)
        with pytest.raises(SiloError, match=r"questions_per_hour_all = 5 over all askers.* in 3540 seconds"):
            ledger.take(THREE, "cid", 60, questions=1)
        with pytest.raises(SiloError, match=r"questions_per_hour = 3 for 'ann'.* in 3540 seconds") as told:
            ledger.take(THREE, "ann", 60, questions=1)
        assert "bob" not in str(told.value)


def test_of_several_limits_that_which_is_free_last_is_told(path: Path) -> None:
    policy = Policy(questions_per_hour=1, words_per_day=10, words_per_day_all=10)
    with Ledger(path) as ledger:
        ledger.take(policy, "ann", 0, questions=1, words=10)
        with pytest.raises(SiloError, match=r"words_per_day = 10 .*: 1 more words would pass it; free again in 86390 seconds"):
            ledger.take(policy, "ann", 10, questions=1, words=1)
        with pytest.raises(SiloError, match=r"words_per_day = 10 .*: 11 more words at once are more than it ever allows"):
            ledger.take(policy, "ann", DAY, questions=1, words=11)
        ledger.take(policy, "ann", DAY, questions=1, words=10)


def test_a_look_at_what_is_left_changes_nothing(path: Path) -> None:
    with Ledger(path) as ledger:
        assert ledger.left(Policy(), "ann", 0) == Left(None, None)
        ledger.take(THREE, "ann", 0, questions=1, words=30)
        before = booked(path)
        assert ledger.left(THREE, "ann", 10) == Left(2, 70)
        assert ledger.left(THREE, "bob", 10) == Left(3, 100)
        assert ledger.left(THREE, "ann", HOUR) == Left(3, 70)
        assert ledger.left(Policy(words_per_day=20), "ann", 10) == Left(None, 0), "a stricter policy since then"
        assert booked(path) == before


def test_old_entries_go(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.take(Policy(), "ann", 0, questions=1)
        ledger.take(Policy(), "ann", 2 * DAY - 1, questions=1)
        assert len(booked(path)) == 2
        ledger.take(Policy(), "ann", 2 * DAY, questions=1)
        assert [at for at, *_ in booked(path)] == [2 * DAY - 1, 2 * DAY]


def test_nothing_is_given_back(path: Path) -> None:
    with Ledger(path) as ledger:
        for wrong in ({"questions": -1}, {"words": -1}):
            with pytest.raises(ValueError, match="given back"):
                ledger.take(THREE, "ann", 0, **wrong)
        with pytest.raises(ValueError, match="no time"):
            ledger.take(THREE, "ann", float("nan"), questions=1)
        ledger.take(THREE, "ann", 0)
        assert ledger.db.execute("pragma journal_mode").fetchone()[0] == "wal"
    assert booked(path) == []


def test_any_name_is_one(path: Path) -> None:
    """What a server claims may be no text, or endless."""
    with Ledger(path) as ledger:
        for name in ("\ud800", "a\nb", "x" * 10_000, ""):
            ledger.take(Policy(questions_per_hour=1), name, 0, questions=1)
            with pytest.raises(SiloError) as told:
                ledger.take(Policy(questions_per_hour=1), name, 0, questions=1)
            assert str(told.value).isprintable()
    assert max(len(name) for _, name, *_ in booked(path)) == 500


times = st.floats(-DAY / 2, DAY / 2) | st.integers(0, 9).map(lambda n: n * 900.0)
asks = st.tuples(times, st.sampled_from("ab"), st.integers(0, 3))


@settings(max_examples=40)
@given(st.lists(asks, max_size=40), st.integers(1, 4), st.integers(1, 6), st.booleans())
def test_in_no_hour_more_than_the_limit(
    tmp_path_factory: pytest.TempPathFactory, sequence: list[tuple[float, str, int]], each: int, together: int, anew: bool
) -> None:
    """Times in any order; the ledger opened anew for each, too. What is let through is the most that may be."""
    path = tmp_path_factory.mktemp("ledger") / "asked"
    policy = Policy(questions_per_hour=each, questions_per_hour_all=together)
    through = list[tuple[float, str, int]]()
    ledger = Ledger(path)
    for now, asker, questions in sequence:
        if anew:
            ledger.close()
            ledger = Ledger(path)
        recent = [one for one in through if one[0] + HOUR > now]
        mine = sum(n for _, who, n in recent if who == asker)
        fits = questions + mine <= each and questions + sum(n for *_, n in recent) <= together
        try:
            ledger.take(policy, asker, now, questions=questions)
            assert fits or not questions
            through.append((now, asker, questions))
        except SiloError:
            assert not fits
    ledger.close()
    for end, *_ in through:
        window = [one for one in through if one[0] <= end < one[0] + HOUR]
        assert sum(n for *_, n in window) <= together
        for asker in "ab":
            assert sum(n for _, who, n in window if who == asker) <= each


def left(ledger: Ledger, now: float) -> int:
    questions = ledger.left(THREE, "ann", now).questions
    assert questions is not None
    return questions


def test_it_says_truly_when_it_is_free(path: Path) -> None:
    """At that second it is let through, and not one before."""
    with Ledger(path) as ledger:
        for now, questions in ((5, 2), (70, 1)):
            ledger.take(THREE, "ann", now, questions=questions)
        for questions, free in ((1, 3605), (2, 3605), (3, 3670)):
            with pytest.raises(SiloError, match=f" in {free - 100} seconds"):
                ledger.take(THREE, "ann", 100, questions=questions)
            assert left(ledger, free) >= questions > left(ledger, free - 1)


def test_threads_with_two_ledgers_keep_one_limit(path: Path) -> None:
    policy, ready = Policy(questions_per_hour_all=20), threading.Barrier(8)
    through, refused = list[str](), list[str]()

    def ask(ledger: Ledger, name: str) -> None:
        ready.wait()
        for _ in range(10):
            try:
                ledger.take(policy, name, 0, questions=1)
                through.append(name)
            except SiloError as error:
                refused.append(str(error))

    with Ledger(path) as one, Ledger(path) as other:
        threads = [threading.Thread(target=ask, args=((one, other)[i % 2], str(i))) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(through), len(refused)) == (20, 60)
    assert all("questions_per_hour_all = 20 over all" in error for error in refused)
    assert sum(questions for *_, questions, _ in booked(path)) == 20


ASKER = """
import sys
from pathlib import Path
from fedtailor.errors import SiloError
from fedtailor.retrieval.ledger import Ledger
from fedtailor.retrieval.policy import Policy
policy = Policy(questions_per_hour_all=int(sys.argv[2]))
with Ledger(Path(sys.argv[1])) as ledger:
    for _ in range(int(sys.argv[3])):
        try:
            ledger.take(policy, "ann", 0, questions=1)
            print("yes", flush=True)
        except SiloError:
            print("no", flush=True)
"""


def asker(path: Path, most: int, times: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", ASKER, str(path), str(most), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_keep_one_limit(path: Path) -> None:
    """They make the file at once, too."""
    both = [asker(path, 30, 25) for _ in range(2)]
    said = [one.communicate()[0].split() for one in both]
    assert [len(words) for words in said] == [25, 25]
    assert sum(words.count("yes") for words in said) == 30


def test_a_kill_gives_nothing_back(path: Path) -> None:
    """What was let through is booked before it is said."""
    one = asker(path, 10**6, 10**6)
    assert one.stdout
    said = [one.stdout.readline() for _ in range(50)]
    one.send_signal(signal.SIGKILL)
    said += one.stdout.readlines()
    one.wait()
    assert len(booked(path)) >= len(said) >= 50
    with Ledger(path) as ledger, pytest.raises(SiloError):
        ledger.take(Policy(questions_per_hour_all=50), "bob", 1, questions=1)


def test_a_file_of_another_program_is_not_touched(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"no database, but some notes of mine")
    with pytest.raises(UserError, match=r"asked: what was asked is kept there, but it is damaged, or of another program"):
        Ledger(path)
    assert path.read_bytes() == b"no database, but some notes of mine"
    other = tmp_path / "other"
    with sqlite3.connect(other) as db:
        db.execute("create table notes (a)")
    before = other.read_bytes()
    with pytest.raises(UserError, match="another program's; name another file"):
        Ledger(other)
    assert other.read_bytes() == before
    with pytest.raises(UserError, match="cannot be opened"):
        Ledger(tmp_path / "none" / "asked")


def test_what_cannot_be_booked_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.db.execute("drop table taken")
        with pytest.raises(SiloError, match=r"cannot be kept \(no such table: taken\), so nothing is told"):
            ledger.take(Policy(), "ann", 0, questions=1)

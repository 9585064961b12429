"""Exit codes and suggestions."""

from __future__ import annotations

import pytest

from fedtailor.errors import FedtailorError, RunError, SiloError, UserError, printable, suggest


@pytest.mark.parametrize(("kind", "code"), [(UserError, 2), (RunError, 1), (SiloError, 1), (FedtailorError, 1)])
def test_each_failure_has_its_exit_code(kind: type[FedtailorError], code: int) -> None:
    assert kind("x").exit_code == code
    assert issubclass(kind, FedtailorError)


@pytest.mark.parametrize(
    ("value", "choices", "text"),
    [
        ("step", ["steps", "rows"], "; did you mean 'steps'? (choices: rows, steps)"),
        ("zzz", ["steps", "rows"], " (choices: rows, steps)"),
        ("lorra", {"lora": 1, "full": 2}, "; did you mean 'lora'? (choices: full, lora)"),
        ("", ["b", "a"], " (choices: a, b)"),
        ("x", [], ""),
    ],
)
def test_a_suggestion_names_what_is_close_and_all_choices(value: str, choices: list[str], text: str) -> None:
    assert suggest(value, choices) == text


def test_what_another_machine_says_is_one_short_line() -> None:
    assert printable("so fa\x72: ü\n\x1b[2J\ud800" + "a" * 1000) == "so far: ü??[2J?" + "a" * 485
    assert printable(("no", "text")) == "('no', 'text')"

"""The failures a person is told about in one line; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedtailorError(Exception):
    """Base of all failures with a message written for the user. `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(FedtailorError):
    """The user can mend it: a file, a setting, a column, a missing package. Exit code 2."""

    exit_code = 2


class RunError(FedtailorError):
    """The run itself failed: a diverged loss, a full disk, no reply at all. Exit code 1."""


class NoReply(RunError):
    """An exchange that brought nothing that can be used."""


class SiloError(FedtailorError):
    """One silo could not do its work. The engine turns it into a named, counted `Failure`; the others go on."""


def printable(said: object) -> str:
    """What another machine said, as one line of 500 letters at most, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(said)[:500])


def suggest(value: str, choices: Iterable[str]) -> str:
    """`; did you mean 'steps'?` when something close exists, then the choices themselves."""
    known = sorted(choices)
    close = difflib.get_close_matches(value, known, n=1)
    meant = f"; did you mean {close[0]!r}?" if close else ""
    return f"{meant} (choices: {', '.join(known)})" if known else meant

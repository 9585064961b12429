"""Structured data to text, in the manner of E2E (Novikova et al. 2017): a Debian package's debtags -> its synopsis.

`name[levee], section[editors], use[editing], uitoolkit[ncurses]` -> what the maintainer says it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fedtailor.demo import _debian, split_of

DESCRIPTION = "about 3,600 lists of facets and a sentence that says them; 24 silos: Debian's sections"
LICENCE = _debian.LICENCE

FACETS = (
    "use", "field", "game", "works-with", "works-with-format", "protocol", "interface", "uitoolkit", "implemented-in",
    "suite", "hardware", "scope", "sound", "science", "biology", "network", "security", "admin", "mail", "web",
    "culture", "devel", "system", "accessibility",
)
# These say how a program is made, and little of what it does.
WEAK = {"interface", "uitoolkit", "implemented-in", "scope", "system", "accessibility"}
MAX_VALUES = 4


def build() -> list[dict[str, Any]]:
    return rows(_debian.packages())


def rows(packages: Iterable[_debian.Package]) -> list[dict[str, Any]]:
    """Columns: id, silo, split, input, output. Programs and their data with two or more telling facets."""
    made = []
    for package in packages:
        facets = _facets(package.tags)
        if {"role::program", "role::app-data"} & set(package.tags) and len(facets.keys() - WEAK) >= 2:
            said = {"name": [package.name], "section": [package.section], **facets}
            text = ", ".join(f"{_plain(key)}[{', '.join(values[:MAX_VALUES])}]" for key, values in said.items())
            made.append(
                {
                    "id": package.name,
                    "silo": package.section,
                    "split": split_of(package.name),
                    "input": text,
                    "output": package.synopsis,
                }
            )
    return made


def _facets(tags: Iterable[str]) -> dict[str, list[str]]:
    """In the order of FACETS."""
    found: dict[str, list[str]] = {facet: [] for facet in FACETS}
    for tag in tags:
        facet, _, value = tag.partition("::")
        if facet in found and value != "TODO":
            found[facet].append(_plain(value))
    return {facet: values for facet, values in found.items() if values}


def _plain(word: str) -> str:
    return word.replace("-", " ").replace(":", " ")

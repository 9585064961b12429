"""The programs in a Debian release, one package of each source, as apt's own lists describe them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from fedtailor import fetch

LICENCE = "package descriptions of Debian, each under the licence of its package; not redistributed, fetched by apt"

SECTIONS = frozenset({
    "admin", "comm", "database", "devel", "editors", "education", "electronics", "fonts", "games", "gnome",
    "graphics", "hamradio", "kde", "mail", "math", "net", "science", "sound", "text", "utils", "vcs", "video", "web",
    "x11",
})

_DEPENDENT = re.compile(r"-(dev|dbg|dbgsym|doc|docs|data|common|examples)(-\d+)?$")
_BOILERPLATE = re.compile(
    r"transitional|dummy|meta-?\s?package|development files|data files|common files|shared librar|locali[sz]ation|"
    r"header files|documentation$|- database",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Package:
    name: str
    source: str
    section: str
    synopsis: str
    text: str  # the long description, its lines joined
    tags: tuple[str, ...]  # debtags, such as use::editing

    @cached_property
    def words(self) -> int:
        return len(self.text.split())


def packages() -> list[Package]:
    """Of all that apt offers, those with a description that says something. See `select`."""
    with fetch.apt() as env:
        return select(fetch.apt_lists(env, "Packages"), fetch.apt_lists(env, "Translation-en"))


def select(lists: Iterable[Mapping[str, str]], translations: Iterable[Mapping[str, str]]) -> list[Package]:
    """One package per source: the one named like it, or else the first by name; those named like their source come
    first. Left out: libraries' sections, packages that go with another (-dev, -data), boilerplate synopses, synopses of
    fewer than 3 or more than 14 words or used before, and long descriptions under 25 words."""
    long = {(t["Package"], t["Description-md5"]): t["Description-en"] for t in translations}
    found: dict[str, Package] = {}
    tags: dict[str, tuple[str, ...]] = {}
    for entry in lists:
        name = entry["Package"]
        # Security updates carry no tags, so they are taken from whichever list has them.
        if "Tag" in entry:
            tags.setdefault(name, tuple(tag.strip() for tag in entry["Tag"].split(",")))
        text = long.get((name, entry.get("Description-md5", "")), "").partition("\n")[2]
        section = entry.get("Section", "").rpartition("/")[2]
        source = entry.get("Source", name).split()[0]
        found.setdefault(name, Package(name, source, section, entry.get("Description", ""), _joined(text), ()))
    chosen = []
    sources = set()
    synopses = set()
    for package in sorted(found.values(), key=lambda p: (p.name != p.source, p.name)):
        synopsis = package.synopsis.casefold()
        if package.source not in sources and synopsis not in synopses and _says_something(package):
            sources.add(package.source)
            synopses.add(synopsis)
            chosen.append(_tagged(package, tags.get(package.name, ())))
    return chosen


def _says_something(package: Package) -> bool:
    return (
        package.section in SECTIONS
        and 3 <= len(package.synopsis.split()) <= 14
        and package.words >= 25
        and not _DEPENDENT.search(package.name)
        and not _BOILERPLATE.search(package.synopsis)
    )


def _tagged(package: Package, tags: tuple[str, ...]) -> Package:
    return Package(package.name, package.source, package.section, package.synopsis, package.text, tags)


def _joined(text: str) -> str:
    """A line of one dot is an empty line in control files."""
    return " ".join(word for line in text.split("\n") if line.strip() != "." for word in line.split())

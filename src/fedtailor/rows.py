"""One record of a source -> one `Row`: the template filled in, the answer checked, the turns of a chat taken apart."""

from __future__ import annotations

import hashlib
import json
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedtailor import images
from fedtailor.errors import UserError, suggest
from fedtailor.sources import Table

if TYPE_CHECKING:
    from fedtailor.data import Data

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One example. `prompt` is what the model reads, the template filled in; "" for a chat row, whose turns before the
    answer are `messages`. `answer` is what it should say, without spaces around it (the model joins the two): the label
    word in classification. `id` is the column `id` where there is one, else from the content."""

    prompt: str
    answer: str
    id: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    image: images.Image | None = None  # what a vision base looks at; its `prompt` is ""
    frame: tuple[int, int] = field(default=(0, 0), compare=False)  # the template's letters before and after its fields

    @property
    def input(self) -> str:
        """The prompt without the template's own words around it: what another prompt is put around."""
        return self.prompt[self.frame[0] : len(self.prompt) - self.frame[1]]

    def words(self) -> int:
        """Of the prompt, or of all turns before the answer."""
        return len(self.prompt.split()) + sum(len(turn["content"].split()) for turn in self.messages)


@lru_cache(maxsize=256)
def parts(template: str) -> tuple[tuple[str, str | None], ...]:
    """(text, the column after it or None), in order. ValueError where it is not a plain template.

    Values are joined, not `str.format`ted: "{text.x}" would read attributes, and a column may be called "a.b".
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write {{{{ and }}}} for braces in the text") from None
    for _, column, spec, conversion in parsed:
        if column == "" or spec or conversion:
            raise ValueError(f"template {template!r}: a field is {{column}}, with a name and nothing else inside")
    return tuple((text, column) for text, column, _, _ in parsed)


def columns(template: str) -> tuple[str, ...]:
    """The columns a template reads."""
    return tuple(dict.fromkeys(column for _, column in parts(template) if column is not None))


def filled(template: str, values: Mapping[str, str]) -> tuple[str, tuple[int, int]]:
    """The prompt of these values, and its `Row.frame`."""
    found = parts(template)
    text = "".join(text + ("" if c is None else values[c]) for text, c in found)
    return text, (len(found[0][0]), len(found[-1][0]) if found[-1][1] is None else 0)


def missing(setting: str, column: str, table: Table) -> list[str]:
    """The error, if the table lacks this column. `setting` is its place, such as `[data] label`."""
    known = column in table.columns
    return [] if known else [f"{setting}: {table.name} has no column {column!r}{suggest(column, table.columns)}"]


def lacking(place: str, data: Data, table: Table) -> list[str]:
    """The errors, one for each column that the settings name and the table lacks."""
    named = [("template", column) for column in columns(data.template)]
    named += [(setting, getattr(data, setting)) for setting in ("answer", "label", "messages", "image") if getattr(data, setting)]
    return [error for setting, column in named for error in missing(f"{place} {setting}", column, table)]


def value(column: str, table: Table, index: int) -> Any:
    """Whatever is there, but null."""
    found = table.rows[index].get(column)
    if found is None:
        raise UserError(f"{table.place(index)}: nothing in column {column!r}; fill it in, or remove the row")
    return found


def word(column: str, table: Table, index: int, what: str) -> str:
    """A value that must not be blank, as text without spaces around it."""
    found = str(value(column, table, index)).strip()
    if not found:
        raise UserError(f"{table.place(index)}: the {what} (column {column!r}) is empty; fill it in, or remove the row")
    return found


def content(data: Data, table: Table, index: int) -> str:
    """What decides a row's split: the values that make the prompt, without the wording around them or the answer."""
    if data.messages:
        return json.dumps(_turns(data, table, index)[:-1], ensure_ascii=False, sort_keys=True)
    if data.image:  # by what is in the picture, not by the name of its file
        return _image(data, table, index).sha256()
    return json.dumps(
        {c: str(value(c, table, index)) for c in columns(data.template)}, ensure_ascii=False, sort_keys=True
    )


def make(data: Data, labels: tuple[str, ...], table: Table, index: int, silo: str, answered: bool = True) -> Row:
    """`labels` matters for classification only. Without `answered` the answer is "". Raises UserError, with the row's place."""
    image, frame = _image(data, table, index) if data.image else None, (0, 0)
    if data.messages:
        *before, last = _turns(data, table, index)
        prompt, answer, messages = "", last["content"].strip(), tuple(before)
    else:
        messages = ()
        values = {c: str(value(c, table, index)) for c in columns(data.template)}
        prompt, frame = filled(data.template, values) if data.template else ("", frame)
        answer = "" if not answered else (
            _label(data.label, labels, table, index, silo) if data.label else word(data.answer, table, index, "answer")
        )
    given = table.rows[index].get("id")
    told = (prompt, messages, answer) if image is None else (image.sha256(), answer)
    id = str(given) if given is not None else digest(*told)[:12]
    return Row(prompt, answer, id, messages, image, frame)


def plain(row: Row) -> tuple[Any, ...]:
    """All of a row as what `digest` takes."""
    told = (row.prompt, row.answer, row.id, row.messages)
    return (*told, row.image.sha256()) if row.image is not None else told


def mislabelled(many: Sequence[Row], labels: Sequence[str], share: float, seed: int, silo: str) -> tuple[Row, ...]:
    """`share` of the rows, rounded, with another label, each other one as likely; drawn by what the rows are."""
    if not share:
        return tuple(many)
    dice = [digest("label noise", seed, silo, plain(row)) for row in many]
    drawn = set(sorted(range(len(many)), key=dice.__getitem__)[: math.floor(share * len(many) + 0.5)])
    return tuple(replace(row, answer=_another(row.answer, labels, dice[i])) if i in drawn else row for i, row in enumerate(many))


def _another(label: str, labels: Sequence[str], dice: str) -> str:
    others = [each for each in labels if each != label]
    return others[int(dice[-12:], 16) % len(others)]  # its end: by its beginning the row was drawn


def _image(data: Data, table: Table, index: int) -> images.Image:
    try:
        return images.read(value(data.image, table, index), table.folder)
    except ValueError as error:
        raise UserError(f"{table.place(index)}: column {data.image!r}: {error}") from None


def digest(*what: Any) -> str:
    return hashlib.sha256(json.dumps(what, ensure_ascii=False).encode()).hexdigest()


def _label(column: str, labels: tuple[str, ...], table: Table, index: int, silo: str) -> str:
    found = word(column, table, index, "label")
    if found in labels:
        return found
    raw = value(column, table, index)
    if isinstance(raw, str) and found.isascii() and found.isdigit():  # CSV has no numbers
        raw = int(found)
    if isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw < len(labels):
        return labels[raw]
    raise UserError(
        f"{table.place(index)} (silo {silo!r}): label {found!r} is not in labels{suggest(found, labels)}; correct the "
        f"row, or add the word to [data] labels"
    )


def _turns(data: Data, table: Table, index: int) -> list[dict[str, str]]:
    """At least two, the last one the assistant's. CSV files hold them as JSON text."""
    found = value(data.messages, table, index)
    where = f"{table.place(index)}: column {data.messages!r}"
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise UserError(
                f'{where} is not valid JSON ({error}); write [{{"role": ..., "content": ...}}, ...]'
            ) from None
    if not isinstance(found, list) or len(found) < 2:
        raise UserError(f"{where} must be a list of two or more {{role, content}}, the last one the assistant's answer")
    for number, turn in enumerate(found, start=1):
        if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where}, turn {number}: needs a text under each of role and content")
        if turn["role"] not in ROLES:
            raise UserError(f"{where}, turn {number}: role {turn['role']!r} is unknown{suggest(turn['role'], ROLES)}")
    if found[-1]["role"] != "assistant":
        raise UserError(f"{where}: the last turn is the {found[-1]['role']}'s, and must be the assistant's answer")
    if not found[-1]["content"].strip():
        raise UserError(f"{where}: the assistant's answer is empty; fill it in, or remove the row")
    return [{"role": turn["role"], "content": turn["content"]} for turn in found]

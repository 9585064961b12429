"""Sources -> rows: what each silo trains on, validates on and is tested on.

    Data(source="reviews.csv", template="{text}\\nSentiment:", label="mood", silo_column="shop")

The order of work: read, deal to silos, fill in templates, split, filter, choose. The split of a row depends on nothing
but its own content, so it survives another order of the file, another seed, more rows and another partition.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from fedtailor import rows, sources
from fedtailor.errors import UserError, suggest
from fedtailor.limits import Limits
from fedtailor.partition import partition
from fedtailor.retrieval.policy import Policy
from fedtailor.rows import Row as Row
from fedtailor.sources import Table

if TYPE_CHECKING:
    from fedtailor.retrieval.corpus import Corpus

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]

SILO_FIELDS = frozenset(
    {"template", "image", "answer", "label", "messages", "max_words", "max_train", "max_val", "max_test", "documents"}
)


@dataclass(frozen=True)
class SiloData:
    """`train` is never empty. `val` or `test` may be, as long as some other silo has rows there."""

    train: tuple[Row, ...]
    val: tuple[Row, ...]
    test: tuple[Row, ...]
    labels: tuple[str, ...] = ()  # the label words, in order, the same for all silos; empty for generation
    settings: Mapping[str, Any] = field(default_factory=dict)  # method settings that [silo.NAME] overrides
    limits: Limits = field(default_factory=Limits)  # its owner's
    corpus: Corpus | None = None  # its documents, to be searched where they are


@dataclass(frozen=True)
class Data:
    """The table [data] of an experiment. Exactly one of `answer`, `label` and `messages` says what is learnt."""

    source: str  # a demo set, a file (.jsonl .csv .parquet), a folder saved by datasets.save_to_disk, or a hub id
    config: str = ""  # of a hub set
    revision: str = ""  # of a hub set
    template: str = ""  # the prompt, with {column} fields; {{ and }} are braces
    image: str = ""  # for a vision base, in place of template: the column of the picture (see `images.read`)
    answer: str = ""  # generation: the column of the answer
    label: str = ""  # classification: the column of the label word, or of its number in `labels`
    messages: str = ""  # chat: the column of [{role, content}, ...]; the last turn is the assistant's
    labels: tuple[str, ...] = ()  # the label words; by default the distinct values, sorted
    silo_column: str = ""  # for partition "column": who owns the row
    partition: Literal["column", "iid", "dirichlet", "label", "size"] = "column"
    silos: Positive | None = None  # how many a partition makes
    alpha: Annotated[float, Field(gt=0)] = 0.5  # of "dirichlet": the smaller, the more skewed
    labels_per_silo: Positive = 1  # of "label"
    split_column: str = "split"  # train; valid, validation, val or dev; test. "": cut all by content
    val_fraction: Fraction = 0.1  # for a split that the column does not name, or with no column; 0: none
    test_fraction: Fraction = 0.1
    max_words: Positive | None = None  # rows whose prompt has more words are dropped, and counted
    max_train: Positive | None = None  # rows per silo; the same choice whatever the order of the source
    max_val: Positive | None = None
    max_test: Positive | None = None
    public: str = ""  # rows that the server holds, in columns as the silos': a demo set, file or hub id, as `source`
    public_fraction: Fraction = 0.0  # or so many training rows, held out of every silo, without their answers; in process only
    max_public: Positive | None = None
    label_noise: Fraction = 0.0  # of each silo's training and validation labels, which are replaced by another; never test
    only: tuple[str, ...] = ()  # of the silos that silo_column names, these alone
    corpus: str = ""  # what is searched: a table, or "FOLDER/{silo}.index", see `retrieval.corpora`; in process only
    documents: Policy = field(default_factory=Policy)  # what of it may leave a silo; over a federation silos say so themselves

    def __post_init__(self) -> None:
        said = [name for name in ("answer", "label", "messages") if getattr(self, name)]
        if len(said) != 1:
            raise ValueError(f"set exactly one of answer, label and messages, not {' and '.join(said) or 'none'}")
        if self.messages and self.template:
            raise ValueError("template does not go with messages: the turns are the prompt; remove one of them")
        if self.image and (self.template or not self.label):
            raise ValueError("image goes with label, and without template: the picture is all that a vision base looks at")
        if not self.messages and not self.template and not self.image:
            raise ValueError('template is missing; write the prompt with {column} fields, such as "{text}"')
        if self.template and not rows.columns(self.template):
            raise ValueError(
                f"template {self.template!r} has no field, so all prompts would be equal; add a {{column}}"
            )
        if self.labels and not self.label:
            raise ValueError("labels are for classification; set label to the column that holds them")
        if self.labels and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"labels must be two or more different words, not {list(self.labels)}")
        if self.label_noise and not self.label:
            raise ValueError("label_noise is of labels; set label, or remove it")
        self._check_silos()
        if self.public and self.public_fraction:
            raise ValueError("public names the server's rows, public_fraction holds out the silos'; remove one of them")
        if self.val_fraction + self.test_fraction + self.public_fraction >= 1:
            public = f", public_fraction {self.public_fraction}" if self.public_fraction else ""
            raise ValueError(
                f"val_fraction {self.val_fraction}, test_fraction {self.test_fraction}{public} leave no row to train on; "
                f"their sum must be below 1"
            )

    def _check_silos(self) -> None:
        if self.partition == "column":
            if self.silos:
                raise ValueError("silos goes with a partition such as 'iid'; set partition, or remove silos")
            if not self.silo_column:
                raise ValueError("say whose each row is: set silo_column, or partition (iid, dirichlet, label, size)")
            return
        if self.silo_column:
            raise ValueError(
                f"partition {self.partition!r} and silo_column both say whose a row is; remove one of them"
            )
        if not self.silos:
            raise ValueError(f"partition {self.partition!r} needs silos, their number")
        if self.partition in ("dirichlet", "label") and not self.label:
            raise ValueError(f"partition {self.partition!r} deals by label and needs label; without, use iid or size")


@dataclass(frozen=True)
class Loaded:
    silos: dict[str, SiloData]  # sorted by name
    sha256: str  # of all that is in `silos` but the settings
    dropped: dict[str, int]  # by silo: rows with more than max_words words
    public: tuple[Row, ...] = ()  # the server's; an answer may be "", where there is none


def load(data: Data, overrides: Mapping[str, Mapping[str, Any]], seed: int, owner: str = "") -> Loaded:
    """The rows of every silo. `overrides` holds the [silo.NAME] tables: their `SILO_FIELDS` replace those of `data` for
    that silo, and all keys that are no field of `Data` end in its `settings`.

    Splits: by `split_column` where the source has it. A split that it never names, and all of them without the column,
    are cut off by a SHA-256 of the columns that the prompt is made of: equal prompts never fall on both sides. `seed`
    decides the partition (all splits together, see `partition`) and which rows `max_train` and its like keep. Rows stay
    in the order of the source. A silo must have training rows; one may lack val or test rows if others have some.

    Raises UserError, one line for each place, for whatever in the source, a row or a table is not as it must be.
    """
    table = sources.read(data.source, config=data.config, revision=data.revision, split_column=data.split_column)
    errors = rows.lacking("[data]", data, table)
    if data.partition == "column" and not owner:
        errors += rows.missing("[data] silo_column", data.silo_column, table)
    if data.split_column not in ("", Data.split_column):
        errors += rows.missing("[data] split_column", data.split_column, table)
    if errors:
        raise UserError("\n".join(errors))
    split = _splitter(data, table)
    members = {owner: list(range(len(table.rows)))} if owner else _members(data, table, split, seed)
    unknown = [f"[silo.{n}]: the data has no silo of this name{suggest(n, members)}" for n in overrides if n not in members]
    if unknown:
        raise UserError("\n".join(unknown))
    if data.only:
        members = _only(data.only, members)
    own = {name: _own(data, name, overrides.get(name, {}), table) for name in sorted(members)}
    labels = data.labels or _label_words(table, own, members)
    corpora = _corpora(data, own)
    silos, dropped = {}, {}
    held: list[Row] = []
    for name, mine in own.items():
        parts: dict[str, list[Row]] = {"train": [], "val": [], "test": [], "public": []}
        for index in members[name]:
            parts[split(mine, index)].append(rows.make(mine, labels, table, index, name))
        free = [row for row in parts.pop("public") if not mine.max_words or row.words() <= mine.max_words]
        held += [replace(row, answer="", id="") for row in free]
        found = {part: len(many) for part, many in parts.items()}
        if mine.max_words:
            parts = {part: [row for row in many if row.words() <= mine.max_words] for part, many in parts.items()}
        dropped[name] = sum(found.values()) - sum(map(len, parts.values()))
        if not parts["train"]:
            raise UserError(_no_training(name, found, dropped[name], mine.max_words))
        kept = {part: _choose(many, getattr(mine, f"max_{part}"), seed, name) for part, many in parts.items()}
        if mine.label:
            kept |= {p: rows.mislabelled(kept[p], labels, data.label_noise, seed, name) for p in ("train", "val")}
        settings = {key: value for key, value in overrides.get(name, {}).items() if key not in SILO_FIELDS}
        shown = labels if mine.label else ()
        silos[name] = SiloData(
            kept["train"], kept["val"], kept["test"], labels=shown, settings=settings, corpus=corpora.get(name)
        )
    for part, fraction in (("val", data.val_fraction), ("test", data.test_fraction)):
        if fraction and not any(getattr(silo, part) for silo in silos.values()):
            raise UserError(
                f"[data] source {table.name}: no silo has a row in {part}; add rows, or raise {part}_fraction (now "
                f"{fraction}), or set it to 0 to go without"
            )
    public = _choose(held, data.max_public, seed, "public") if held else known_to_all(data, labels, seed)
    whole = rows.digest(sha256(silos), [rows.plain(row) for row in public]) if public else sha256(silos)
    return Loaded(silos, whole, dropped, public)


def known_to_all(data: Data, labels: tuple[str, ...], seed: int) -> tuple[Row, ...]:
    """The rows of `data.public`. A column of answers may be missing: then they have none."""
    if not data.public:
        return ()
    try:
        table = sources.read(data.public, config="", revision="", split_column="")
    except UserError as error:
        raise UserError(str(error).replace("[data] source", "[data] public")) from error
    answered = all(column in table.columns for column in (data.label or data.answer or data.messages,))
    needed = [("template", column) for column in rows.columns(data.template)] + [("image", data.image)] * bool(data.image)
    if errors := [error for what, column in needed for error in rows.missing(f"[data] public {what}", column, table)]:
        raise UserError("\n".join(errors))
    if not answered and data.messages:
        raise UserError(f"[data] public: {table.name} has no column {data.messages!r}, which holds the turns")
    column = data.label or data.answer
    told = [answered and (not column or bool(str(row.get(column) or "").strip())) for row in table.rows]
    many = [rows.make(data, labels, table, i, "public", ok) for i, ok in enumerate(told)]
    many = [row for row in many if not data.max_words or row.words() <= data.max_words]
    return _choose(many, data.max_public, seed, "public")


def _splitter(data: Data, table: Table) -> Callable[[Data, int], str]:
    """(the silo's data settings, a row's number) -> train, val or test."""
    said = _said(data.split_column, table) if data.split_column in table.columns else []
    test = 0.0 if "test" in said else data.test_fraction
    val = 0.0 if "val" in said else data.val_fraction

    def split(mine: Data, index: int) -> str:
        if said and said[index] != "train":
            return said[index]
        place = int(hashlib.sha256(rows.content(mine, table, index).encode()).hexdigest()[:12], 16) / 16**12
        parts = (("test", test), ("val", val), ("public", data.public_fraction))
        ends = accumulate(share for _, share in parts)
        return next((part for (part, _), end in zip(parts, ends, strict=True) if place < end), "train")

    return split


def _said(column: str, table: Table) -> list[str]:
    """What the split column says of each row, as train, val or test."""
    said = []
    for index in range(len(table.rows)):
        word = rows.word(column, table, index, "split")
        if word.lower() not in sources.SPLITS:
            raise UserError(
                f"{table.place(index)}: column {column!r} says {word!r}, which is no split"
                f'{suggest(word, sources.SPLITS)}; correct the row, or set [data] split_column = ""'
            )
        said.append(sources.SPLITS[word.lower()])
    return said


def _members(data: Data, table: Table, split: Callable[[Data, int], str], seed: int) -> dict[str, list[int]]:
    """Silo name -> the numbers of its rows, ascending."""
    every = range(len(table.rows))
    if data.partition == "column":
        members: dict[str, list[int]] = {}
        for index in every:
            members.setdefault(rows.word(data.silo_column, table, index, "silo's name"), []).append(index)
        return members
    assert data.silos is not None  # __post_init__ saw to it
    return partition(
        data.partition,
        [json.dumps(row, sort_keys=True, default=str) for row in table.rows],
        [rows.word(data.label, table, index, "label") if data.label else "" for index in every],
        [split(data, index) == "train" for index in every],
        silos=data.silos,
        seed=seed,
        alpha=data.alpha,
        labels_per_silo=data.labels_per_silo,
    )


def _only(wanted: Sequence[str], members: Mapping[str, list[int]]) -> dict[str, list[int]]:
    if lacking := [name for name in wanted if name not in members]:
        raise UserError(f"[data] only: the data has no silo {lacking[0]!r}{suggest(lacking[0], members)}")
    return {name: members[name] for name in wanted}


def _corpora(data: Data, own: Mapping[str, Data]) -> dict[str, Corpus]:
    if not data.corpus:
        return {}
    from fedtailor.retrieval import corpora

    return corpora.read(data.corpus, data.silo_column, list(own), {name: mine.documents for name, mine in own.items()})


def _own(data: Data, name: str, override: Mapping[str, Any], table: Table) -> Data:
    """`data` as silo `name` sets it."""
    known = {each.name for each in fields(Data)}
    for key in override:
        if key in known - SILO_FIELDS:
            raise UserError(
                f"[silo.{name}] {key}: holds for all silos, so set it in [data]; of the data settings a silo may have "
                f"its own {', '.join(sorted(SILO_FIELDS))}"
            )
    changed = {key: value for key, value in override.items() if key in SILO_FIELDS}
    if not changed:
        return data
    try:
        own = _schema().validate_python(own_settings(data, changed))
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join([f"[silo.{name}]", *(str(part) for part in first["loc"])])
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
    if errors := rows.lacking(f"[silo.{name}]", own, table):
        raise UserError("\n".join(errors))
    return own


def own_settings(data: Data, changed: Mapping[str, Any]) -> dict[str, Any]:
    """`data` with a silo's settings over it. Of answer, label and messages, the silo's choice replaces the other."""
    learnt = ("answer", "label", "messages")
    cleared = dict.fromkeys(learnt, "") if set(learnt) & set(changed) else {}
    unlabelled = {"labels": (), "label_noise": 0.0} if cleared and "label" not in changed else {}
    return {**asdict(data), **cleared, **unlabelled, **changed}


@cache
def _schema() -> TypeAdapter[Data]:
    return TypeAdapter(Data)


def _label_words(table: Table, own: Mapping[str, Data], members: Mapping[str, list[int]]) -> tuple[str, ...]:
    columns = {name: mine.label for name, mine in own.items() if mine.label}
    words = {rows.word(column, table, index, "label") for name, column in columns.items() for index in members[name]}
    if columns and len(words) == 1:
        raise UserError(
            f"[data] label: {table.name} has no label but {words.pop()!r}, so there is nothing to tell apart; set label "
            f"to another column, or labels to all words there are"
        )
    return tuple(sorted(words))


def _choose(many: list[Row], limit: int | None, seed: int, silo: str) -> tuple[Row, ...]:
    """`limit` of the rows, in their order; the choice depends on what the rows are, not on where they stand."""
    if limit is None or len(many) <= limit:
        return tuple(many)
    ranked = sorted(range(len(many)), key=lambda i: rows.digest("choose", seed, silo, rows.plain(many[i])))
    return tuple(many[i] for i in sorted(ranked[:limit]))


def _no_training(name: str, found: Mapping[str, int], dropped: int, limit: int | None) -> str:
    total = sum(found.values())
    if dropped == total:
        return (
            f"silo {name!r}: all {total} rows have more than {limit} words; raise max_words in [data] or [silo.{name}]"
        )
    if found["train"]:
        return (
            f"silo {name!r}: its {found['train']} training rows all have more than {limit} words; raise max_words in "
            f"[data] or [silo.{name}]"
        )
    return (
        f"silo {name!r}: none of its {total} rows is for training ({found['val']} val, {found['test']} test); add rows, "
        f"or lower val_fraction and test_fraction, or correct the split column"
    )


def sha256(silos: Mapping[str, SiloData], parts: Sequence[str] = ("train", "val", "test")) -> str:
    """Of the rows in these parts, with names and labels."""
    whole = hashlib.sha256()
    for name, silo in silos.items():
        for part in parts:
            whole.update(rows.digest(name, part, silo.labels, [rows.plain(row) for row in getattr(silo, part)]).encode())
        if silo.corpus is not None:
            whole.update(silo.corpus.sha256().encode())
    return whole.hexdigest()

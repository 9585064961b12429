"""silo.toml: what a silo says of itself. Its own data file, columns and limits; nothing of it is sent.

    name = "north"
    [data]                          # laid over the experiment's [data], for this silo alone
    source = "visits.jsonl"         # beside this file; all its rows are this silo's, unless silo_column is set here
    template = "{note}\\nUrgency:"   # where the columns are called otherwise
    [limits]                        # of what any server may ask of it; the stricter of these and the experiment's hold
    minimum = 5                     # rows in a sum
    epsilon = 4.0                   # of each training row in a run, under the noise that a prompt search is asked for
    [documents]                     # what may leave of its index, see `retrieval.policy`
    index = "north.index"           # beside this file; `fedtailor index add` makes it
    share = "snippets"
    words = 40
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from fedtailor import data as rows_of
from fedtailor import demo
from fedtailor.data import SILO_FIELDS, Data, SiloData
from fedtailor.errors import UserError, suggest
from fedtailor.limits import Limits
from fedtailor.models import Base
from fedtailor.retrieval import store
from fedtailor.retrieval.policy import Policy

if TYPE_CHECKING:
    from fedtailor.retrieval.corpus import Corpus

OWN = (SILO_FIELDS - {"documents"}) | {"source", "config", "revision", "silo_column", "split_column"}


@dataclass(frozen=True)
class Site:
    """The settings of one silo's worker."""

    name: str  # as the federation knows it
    folder: Path = Path("silo")  # memory, log and socket; readable by the owner alone
    data: Mapping[str, Any] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    documents: Policy = field(default_factory=Policy)  # without an index it has none to be searched
    server_names_data: bool = False  # rows come from the file that the server's experiment names: to try all on one machine
    models: Mapping[str, str] = field(default_factory=dict)  # the experiment's name of a base -> a local folder
    allow: tuple[str, ...] = ()  # packages besides fedtailor whose methods may run here
    keep_days: Annotated[float, Field(gt=0)] = 90.0  # how long what was learnt of a run that does not go on is kept
    body_limit: Annotated[int, Field(gt=0)] = 4 * 1024**3  # bytes of one message; a larger one is refused unread

    def rows(self, asked: Data, settings: Mapping[str, Any], seed: int) -> SiloData:
        """This silo's rows, read as the experiment asks, with its own settings over it. Raises UserError on a misfit."""
        corpus = self.corpus(asked)
        if corpus is not None and not (asked.source and ("source" in self.data or self.server_names_data)):
            return SiloData((), (), (), limits=self.limits, corpus=corpus)  # asked about its documents, and nothing else
        if "source" not in self.data and not self.server_names_data and asked.source not in demo.names():
            told = "so that no server can choose it; or start with --data ROWS"
            raise UserError(f"[data] source is missing: a silo names its own rows in silo.toml, {told}")
        alone = "source" in self.data and "silo_column" not in self.data
        all_mine = {"partition": "column", "silos": None, "silo_column": self.name} if alone else {}
        # public rows come with requests; who takes part is not asked here
        servers = {"public": "", "public_fraction": 0.0, "corpus": "", "only": ()}
        mine: Data = _checked(Data, {**asdict(asked), **servers, **self.data, **all_mine}, "[data]")
        overrides = {
            k: self.base(v) if isinstance(v, Base) else v for k, v in settings.items() if k not in self.data
        }
        loaded = rows_of.load(mine, {self.name: overrides} if overrides else {}, seed, owner=self.name if alone else "")
        if self.name not in loaded.silos:
            raise UserError(f"[data]: no row is silo {self.name!r}'s{suggest(self.name, loaded.silos)}")
        return replace(loaded.silos[self.name], limits=self.limits, corpus=corpus)

    def corpus(self, asked: Data) -> Corpus | None:
        """Its documents. The policy is its own, whatever the server's experiment says."""
        from fedtailor.retrieval import corpora

        if self.documents.index:
            path = Path(self.documents.index)
            store.load(path).db.close()  # one that is not there is told now
            return _corpus(self.name, self.documents, path, path.stat().st_ino)
        if not (asked.corpus and self.server_names_data):
            return None
        return corpora.read(asked.corpus, asked.silo_column, [self.name], {self.name: self.documents})[self.name]

    def base(self, asked: Base) -> Base:
        return replace(asked, name=self.models.get(asked.name, asked.name))


@lru_cache(maxsize=1)
def _corpus(name: str, policy: Policy, path: Path, inode: int) -> Corpus:
    """One for all runs of a process, which holds its vectors once; another one where another file took its place."""
    from fedtailor.retrieval.corpus import Corpus

    return Corpus(name, policy, path)


def read(path: Path, source: str | None = None) -> Site:
    """The site of a silo.toml; `source` takes the place of its [data] source. Raises UserError with one line per error."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; `fedtailor silo --help` shows what it holds") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as TOML: {error}") from error
    known = {f.name for f in fields(Site)}
    errors = [f"{path}: no setting {key!r}{suggest(key, known)}" for key in table if key not in known]
    own = table.get("data", {})
    kinds = (("limits", Limits), ("documents", Policy))
    for part, keys in (("data", OWN), *((part, frozenset(f.name for f in fields(kind))) for part, kind in kinds)):
        given = table.get(part)
        if given is not None and not isinstance(given, dict):
            errors.append(f"{path}: {part} must be a table, [{part}], not {given!r}")
            continue
        unknown = [key for key in given or () if key not in keys]
        errors += [f"{path}: [{part}] has no setting {key!r}{suggest(key, keys)}" for key in unknown]
    if errors:
        raise UserError("\n".join(errors))
    table["folder"] = str(path.parent / table.get("folder", Site.folder))
    written = own.get("source")
    if source is not None:
        table["data"] = {**own, "source": str(Path(source).resolve()) if Path(source).exists() else source}
    elif isinstance(written, str) and (path.parent / written).exists():
        own["source"] = str((path.parent / written).resolve())
    if isinstance(index := table.get("documents", {}).get("index"), str) and index:
        table["documents"]["index"] = str((path.parent / index).resolve())
    found: Site = _checked(Site, table, str(path))
    return found


def _checked(kind: type[Any], values: Mapping[str, Any], where: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        told = [(".".join(map(str, one["loc"])), one["msg"].removeprefix("Value error, ")) for one in error.errors()]
        raise UserError("\n".join(f"{where} {place}: {message}" for place, message in told)) from None

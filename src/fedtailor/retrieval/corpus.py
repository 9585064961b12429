"""A silo's documents as the code next to them sees them: an index, opened once, and what may leave of it.

The index is a file that the silo keeps (`fedtailor index add`), or, to try things in one process, one made of a table's rows or
of several silos' indexes; these are kept in the cache, by what they hold.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedtailor import fetch, progress
from fedtailor.errors import SiloError
from fedtailor.retrieval import store
from fedtailor.retrieval.cutting import Passage, cut
from fedtailor.retrieval.embedding import Embedder
from fedtailor.retrieval.indexing import AT_ONCE, CUT, OVERLAP, vectors
from fedtailor.retrieval.ledger import Ledger
from fedtailor.retrieval.policy import Policy
from fedtailor.retrieval.reading import Document
from fedtailor.retrieval.redaction import redacted, redacted_title
from fedtailor.retrieval.scoring import Searcher, Statistics, statistics
from fedtailor.retrieval.store import Store
from fedtailor.retrieval.terms import terms

SHOWN = 200_000  # passages that may be fetched after they were found, by whom they were
HIDDEN = re.compile(r"\[[a-z-]+\]")  # what redaction puts in place of a word


@dataclass
class Corpus:
    """One of path, documents and parts says where they are."""

    silo: str
    policy: Policy = field(default_factory=Policy)
    path: Path | None = None  # an index that is there
    documents: Sequence[Document] = ()
    parts: Mapping[str, Corpus] = field(default_factory=dict)  # silo -> its corpus, all as one: documents are named silo/document
    store: Store | None = None  # open
    ledger: Ledger | None = None
    shown: dict[tuple[str, int], None] = field(default_factory=dict)  # asker and passage that it found, the latest last
    left: dict[int, frozenset[int]] = field(default_factory=dict)  # see `_left`
    counted: tuple[str, Statistics] | None = None  # of a version of the index
    held: dict[str, Searcher] = field(default_factory=dict)  # by the embedder's SHA-256

    def sha256(self) -> str:
        """Of what it holds: the same for the same documents."""
        whole = hashlib.sha256()
        if self.path is not None:
            with store.load(self.path) as index:
                whole.update(json.dumps(sorted(index.documents().items())).encode())
        for one in self.documents:
            whole.update(json.dumps([one.name, one.sha256]).encode())
        for name, part in self.parts.items():
            whole.update(json.dumps([name, part.sha256()]).encode())
        return whole.hexdigest()

    @property
    def tagged(self) -> bool:
        """Whether documents with the tag alone are searched."""
        return self.policy.share == "shareable"

    def index(self, embedder: Embedder | None = None) -> Store:
        """Open, for as long as this process runs. Made first where it has to be, which needs the embedder."""
        if self.store is None:
            self.store = self._made(embedder)
        return self.store

    def told(self, embedder: Embedder) -> Searcher:
        """As `searcher`, once each passage has a vector by this embedder. It is the index's own, or was trained from that one."""
        index = self.index(embedder)
        if embedder.base_sha256 != index.about("embedder_sha256"):
            raise SiloError(self._unlike(embedder.name, embedder.base_sha256))
        if lacking := index.lacking(embedder.sha256):
            index.keep(embedder.sha256)
            self.held = dict(list(self.held.items())[-1:])  # each holds a copy of all vectors
            with progress.bar("embedding anew", -(-len(lacking) // AT_ONCE)) as advance:
                for begin in range(0, len(lacking), AT_ONCE):
                    some = lacking[begin : begin + AT_ONCE]
                    vectors = embedder.passages([passage.indexed for _, passage in some])
                    index.embed(embedder.sha256, [at for at, _ in some], vectors)
                    advance()
        return self.searcher(embedder.sha256)

    def searcher(self, embedder_sha256: str) -> Searcher:
        """Over the vectors by that embedder. Raises SiloError where there are none."""
        if embedder_sha256 not in self.held:
            index = self.index()
            if embedder_sha256 not in index.embedders():
                raise SiloError(self._unlike("another", embedder_sha256))
            # of words that it hides it does not say where they are
            shown = (lambda at: self.left.get(at, frozenset())) if self.policy.redacts else None
            self.held[embedder_sha256] = Searcher(index, self.silo, embedder_sha256, self.tagged, shown)
        return self.held[embedder_sha256]

    def passage(self, at: int, asker: str) -> tuple[int, str, Passage] | None:
        """As the index has it; None where this asker did not find it lately, where it is gone, or not to be searched."""
        index = self.index()
        if (asker, at) not in self.shown:
            return None
        try:
            found = index.passage(at)
        except KeyError:
            return None
        return None if self.tagged and found[1] not in index.shareable() else found

    def book(self, asker: str, questions: int = 0, words: int = 0) -> None:
        """What is told to whom. Raises SiloError where the policy's limits are reached. Of a table, for trying, none hold."""
        if not self.policy.limited or self.path is None:
            return
        if self.ledger is None:
            self.ledger = Ledger(self.path.with_name(f"{self.path.name}.asked"))
        self.ledger.take(self.policy, asker, time.time(), questions, words)

    def show(self, asker: str, found: Iterable[int]) -> None:
        """Who asks may fetch these passages from now on: of all that was found by anyone the last `SHOWN`."""
        for at in found:
            self.shown.pop((asker, at), None)
            self.shown[asker, at] = None
        for old in list(self.shown)[: max(0, len(self.shown) - SHOWN)]:
            del self.shown[old]

    def visible(self) -> Statistics:
        """How words are spread, as far as the policy shows them: where it redacts, in what is left of the passages. In a snapshot
        that the caller took."""
        index = self.index()
        if self.counted is None or self.counted[0] != index.version:
            if self.policy.redacts:
                known, having = statistics(index, (), self.tagged), Counter[int]()
                for left in self._left(index).values():
                    having.update(left)
                self.counted = index.version, replace(known, having=having)
            else:
                self.counted = index.version, statistics(index, None, self.tagged)
        return self.counted[1]

    def _left(self, index: Store) -> dict[int, frozenset[int]]:
        """passage -> the words that are left of it; a passage never changes, so that only new ones are redacted."""
        shareable, more, now = index.shareable(), self.policy.recognizer, dict[int, frozenset[int]]()
        if self.counted is not None and self.counted[0].rpartition(" ")[0] != index.about("secret"):  # another file
            self.left = {}
        for at, document, passage in index.passages():
            if self.tagged and document not in shareable:
                continue
            if at not in self.left:
                left = Passage(redacted_title(passage.section, more), redacted(passage.text, more))
                self.left[at] = frozenset(terms(HIDDEN.sub(" ", left.indexed)))
            now[at] = self.left[at]
        self.left = now
        return now

    def _unlike(self, name: str, sha256: str) -> str:
        own = self.index()
        return (
            f"its index's vectors are by {base_name(own.about('embedder'))!r} ({own.about('embedder_sha256')[:12]}), asked is "
            f"{name!r} "
            f"({sha256[:12]}): set method.embedder, or make a new index with --embedder"
        )

    def _made(self, embedder: Embedder | None) -> Store:
        if self.path is not None:
            return store.load(self.path)
        if embedder is None:
            raise SiloError("its documents are in no index yet: it is told of the embedder first")
        size = min(CUT, embedder.reads)
        key = hashlib.sha256(f"{store.FORMAT} {self.sha256()} {embedder.base_sha256} {size}".encode()).hexdigest()[:24]
        path = fetch.cache_dir() / "indexes" / f"{key}.index"
        if path.exists():
            return store.load(path)
        with fetch.workspace() as work:  # a half-made one is never taken for one
            beside = work / path.name
            cut_at = size, min(OVERLAP, size // 4)
            with store.make(beside, embedder.name, embedder.base_sha256, embedder.size, cut_at) as index:
                index.db.execute("update about set value = ? where key = 'secret'", (key,))  # the same noise again
                if self.parts:
                    self._unite(index, embedder)
                else:
                    self._add(index, embedder)
                index.db.execute("pragma journal_mode = delete")  # all of it in the one file
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.replace(path)
        return store.load(path)

    def _add(self, index: Store, embedder: Embedder) -> None:
        size, overlap = int(index.about("cut")), int(index.about("overlap"))
        cuts = [(one, list(cut(one, embedder.model.tokenizer, size, overlap))) for one in self.documents]
        found = vectors(embedder.base, [passage.indexed for _, some in cuts for passage in some])
        begin = 0
        for document, some in cuts:
            index.put(document.name, document.sha256, some, found[begin : begin + len(some)], "")
            begin += len(some)

    def _unite(self, index: Store, embedder: Embedder) -> None:
        for silo, part in self.parts.items():
            other = part.index(embedder)
            if other.about("embedder_sha256") != index.about("embedder_sha256"):
                raise SiloError(f"silo {silo!r}: {part._unlike(embedder.name, embedder.base_sha256)}")
            for name, (sha256, _) in other.documents().items():
                index.put(f"{silo}/{name}", sha256, *other.document(name), "")


def base_name(embedder: str) -> str:
    """Without the folders of a path, which are nobody else's business."""
    return embedder.rstrip("/").rpartition("/")[2] if embedder[:1] == "/" else embedder

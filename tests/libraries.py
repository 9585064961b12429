"""Documents of three silos, and a tiny embedder: for tests of what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import pytest

from fedtailor import data, models
from fedtailor.data import Data
from fedtailor.engines.courier import Courier
from fedtailor.engines.in_process import InProcess
from fedtailor.engines.remote import Remote
from fedtailor.engines.worker import Open
from fedtailor.methods.rag import Rag
from fedtailor.models import Base, Resident
from fedtailor.retrieval import embedding, indexing, session
from fedtailor.retrieval.answered import Answered
from fedtailor.retrieval.corpus import Corpus
from fedtailor.retrieval.policy import Policy

LIBRARIES = {
    "north": {
        "cats.md": "# Cats\nThe black cat sat on the mat.\n\n# Dogs\nThe old dog ran home.\n", "fish.txt": "A fish swims.",
    },
    "south": {
        "birds.md": "# Birds\nThe bird sang at dawn. Ann Lee heard it, call 555-1234.\n", "cats.md": "# Cats\nNo cat here.\n",
    },
    "west": {"trees.md": "# Trees\nAn oak grows slowly. A birch grows fast.\n"},
}  # fmt: skip


@pytest.fixture(scope="session")
def embedder(tmp_path_factory: pytest.TempPathFactory, resident_of: Callable[[str], Resident]) -> str:
    """A folder as transformers writes it: random weights, without a pooling of its own."""
    folder = tmp_path_factory.mktemp("embedder")
    bert = resident_of("bert")
    bert.tuned()
    bert.module.save_pretrained(folder)
    bert.save_reader(folder)
    return str(folder)


def indexes(folder: Path, embedder: str, libraries: Mapping[str, Mapping[str, str]] = LIBRARIES) -> dict[str, Path]:
    """Each silo's index, made of its documents; all are tagged as shareable whose name begins with "cats"."""
    made = {}
    for silo, documents in libraries.items():
        below = folder / f"{silo}-documents"
        below.mkdir(parents=True)
        for name, text in documents.items():
            (below / name).write_text(text)
        made[silo] = folder / f"{silo}.index"
        opened, model = indexing.opened(made[silo], embedder, embedding.load)
        with opened:
            assert not indexing.add(opened, model, [below]).failed
            opened.share([name for name in documents if name.startswith("cats")], True)
    return made


def corpora(made: Mapping[str, Path], policy: Policy | None = None) -> dict[str, Corpus]:
    return {silo: Corpus(silo, policy or Policy(), path) for silo, path in made.items()}


def asked_there_and_here(courier: Courier, folder: Path, embedder: str, deadline: float) -> tuple[Answered, Answered]:
    """One question to silos that search what the server's experiment names, each its own; and the same in one process."""
    passages = folder / "passages.jsonl"
    texts = {"cafe": "Tea is at four.", "clinic": "The nurse signs a discharge.", "shop": "Shoes are on the left."}
    lines = [json.dumps({"site": silo, "document": "a.md", "text": texts[silo]}) for silo in courier.silos]
    passages.write_text("\n".join(lines))
    base = models.load(Base("tiny", dtype="float32"))
    table = Data(source="", template="{question}", answer="answer", silo_column="site", corpus=str(passages))
    method = Rag(embedder=embedder, floor=0.0, words_share=0.9, max_new_tokens=4, deadline=deadline)
    opening = Open("ask", 0, table, Base("tiny", dtype="float32"), threads=1)
    remote = Remote(courier, opening, deadline=deadline, models={"base": base})
    local = InProcess(
        {silo: data.SiloData((), (), (), corpus=one) for silo, one in tables(table, courier.silos).items()}, {"base": base}
    )
    there, here = ([*session.asking(method, engine, base).ask("who signs a discharge")][-1] for engine in (remote, local))
    assert remote.rejected == []
    return there, here


def tables(asked: Data, silos: Collection[str]) -> dict[str, Corpus]:
    from fedtailor.retrieval import corpora as of_data

    return of_data.read(asked.corpus, asked.silo_column, silos, dict.fromkeys(silos, asked.documents))


def same_answer(there: Answered, here: Answered) -> None:
    assert there.sources[0].cited == "[clinic/a.md]"
    assert (there.text, there.sources, there.asked, there.missing) == (here.text, here.sources, here.asked, here.missing)

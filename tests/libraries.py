"""Documents of three silos, and a tiny embedder: for tests of what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from fedtailor.models import Resident
from fedtailor.retrieval import embedding, indexing
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

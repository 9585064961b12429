"""What all tests share: no network, one thread, tiny models of random weights, silos of made-up rows."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is: batches are made by hand, and figures compared, on the CPU

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from commands import fedtailor as fedtailor  # a fixture
from fedtailor.data import Row, SiloData
from fedtailor.images import Image
from fedtailor.models import Resident
from fedtailor.tiny import KINDS, tiny
from flares import federation as federation  # fixtures, too
from flares import flare as flare
from libraries import embedder as embedder
from tiny_runs import conduct

LABELS = ("bad", "good")
hypothesis.settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("untimed")
_tiny = cache(tiny)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in one order. Put back before each test too: a run settles its own number of threads."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def resident_of() -> Callable[[str], Resident]:
    """Any of `KINDS` in fp32, made once: what a test puts on it, the next one takes off."""
    return lambda architecture: _tiny("float32", architecture)


@pytest.fixture
def llama(resident_of: Callable[[str], Resident]) -> Resident:
    return resident_of("llama")


@pytest.fixture
def gpt2(resident_of: Callable[[str], Resident]) -> Resident:
    return resident_of("gpt2")


@pytest.fixture
def bert(resident_of: Callable[[str], Resident]) -> Resident:
    return resident_of("bert")


@pytest.fixture
def vit(resident_of: Callable[[str], Resident]) -> Resident:
    return resident_of("vit")


@pytest.fixture
def t5(resident_of: Callable[[str], Resident]) -> Resident:
    return resident_of("t5")


@pytest.fixture(params=["llama", "gpt2"])
def causal(request: pytest.FixtureRequest, resident_of: Callable[[str], Resident]) -> Resident:
    return resident_of(request.param)


@pytest.fixture(params=["llama", "gpt2", "bert"])
def any_resident(request: pytest.FixtureRequest, resident_of: Callable[[str], Resident]) -> Resident:
    return resident_of(request.param)


@pytest.fixture(scope="session")
def plain(resident_of: Callable[[str], Resident], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The same weights as others load them: saved, and read anew by transformers with its default attention."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    @cache
    def saved(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp(architecture)
        resident = resident_of(architecture)
        resident.tuned()  # nothing on it
        resident.module.save_pretrained(folder)
        return folder

    def load(architecture: str) -> Any:
        kinds: dict[str, Any] = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
        kind = kinds.get(KINDS[architecture], AutoModel)
        module = kind.from_pretrained(saved(architecture), dtype=torch.float32).eval()
        assert module.config._attn_implementation == "sdpa"
        return module

    return load


@pytest.fixture(scope="session")
def rated() -> dict[str, SiloData]:
    """Classification: three silos whose rows differ in length, within a silo and between them."""
    return {
        name: SiloData(
            train=tuple(_rated(subject, i, longer) for i in range(6)),
            val=tuple(_rated(subject, i, longer) for i in range(6, 9)),
            test=tuple(_rated(subject, i, longer) for i in range(9, 12)),
            labels=LABELS,
        )
        for name, subject, longer in (("cafe", "tea", 1), ("shop", "a parcel", 2), ("zoo", "the old bear", 3))
    }


@pytest.fixture(scope="session")
def pictured(rated: dict[str, SiloData]) -> dict[str, SiloData]:
    """As `rated`, with a picture in place of each text: bright above ("good") or below, its contrast the silo's own."""
    dice = torch.Generator().manual_seed(5)

    def picture(row: Row, contrast: int) -> Row:
        values = torch.randint(0, 60, (28, 28), generator=dice)
        values[:14 if row.answer == "good" else 28][-14:] += contrast
        return Row("", row.answer, row.id, image=Image(bytes(values.flatten().tolist()), (28, 28, 1)))

    def silo(rows: SiloData, contrast: int) -> SiloData:
        parts = {part: tuple(picture(row, contrast) for row in getattr(rows, part)) for part in ("train", "val", "test")}
        return SiloData(**parts, labels=rows.labels)

    return {name: silo(rows, 60 * (i + 1)) for i, (name, rows) in enumerate(rated.items())}


@pytest.fixture(scope="session")
def rated_for(rated: dict[str, SiloData], pictured: dict[str, SiloData]) -> Callable[[str], dict[str, SiloData]]:
    """The rows that an architecture reads."""
    return lambda architecture: pictured if KINDS[architecture] == "vision" else rated


@pytest.fixture(scope="session")
def written() -> dict[str, SiloData]:
    """Generation: three silos, answers of several lengths."""
    return {
        name: SiloData(
            train=tuple(_written(subject, i) for i in range(6)),
            val=tuple(_written(subject, i) for i in range(6, 8)),
            test=tuple(_written(subject, i) for i in range(8, 10)),
        )
        for name, subject in (("cafe", "tea"), ("shop", "a parcel"), ("zoo", "the old bear"))
    }


def _rated(subject: str, i: int, longer: int) -> Row:
    words = ("cold", "kind", "slow", "bright")
    text = " and ".join(words[(i + k) % 4] for k in range(1 + i % 3 * longer))
    return Row(f"{subject} {i} was {text}:", LABELS[i % 2], f"{subject}-{i}")


def _written(subject: str, i: int) -> Row:
    return Row(f"Say {i} times {subject}:", " ".join([subject] * (1 + i % 3)), f"{subject}-{i}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run with all its rows and every message kept. Left as it is by every test."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, conduct(folder, "engine.record=true")

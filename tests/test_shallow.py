"""A cut base is the base without some of its layers, and an ordinary folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from fedtailor import models, shallow
from fedtailor.errors import UserError
from fedtailor.models import Base, Resident


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path: Path, resident_of: Callable[[str], Resident], plain: Callable[[str], Any]) -> Callable[[str], Path]:
    def save(architecture: str) -> Path:
        folder = tmp_path / architecture
        plain(architecture).save_pretrained(folder)
        resident_of(architecture).save_reader(folder)
        return folder

    return save


@pytest.mark.parametrize(("architecture", "auto", "layers"), [
    ("llama", AutoModelForCausalLM, "model.layers"), ("gpt2", AutoModelForCausalLM, "transformer.h"),
    ("bert", AutoModel, "encoder.layer"),
])  # fmt: skip
def test_the_layers_that_are_kept_are_the_base_s_own(
    saved: Callable[[str], Path], architecture: str, auto: Any, layers: str
) -> None:
    """One of two: the first. What it answers is what the base answers without its second layer."""
    source = saved(architecture)
    cut = auto.from_pretrained(shallow.folder(str(source), None, 1)).eval()
    whole = auto.from_pretrained(source).eval()
    assert cut.config.num_hidden_layers == len(cut.get_submodule(layers)) == 1
    stack = whole.get_submodule(layers)
    del stack[1]
    whole.config.num_hidden_layers = 1
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        assert torch.equal(cut(ids)[0], whole(ids)[0])


def test_it_is_made_once_and_anew_when_the_base_changed(saved: Callable[[str], Path]) -> None:
    source = saved("llama")
    first = shallow.folder(str(source), None, 1)
    before = (first / "config.json").stat().st_mtime_ns
    assert shallow.folder(str(source), None, 1) == first
    assert (first / "config.json").stat().st_mtime_ns == before
    (source / "generation_config.json").write_text("{}")
    assert shallow.folder(str(source), None, 1) != first
    assert shallow.folder(str(source), None, 2).name.startswith("llama-2-layers-")


def test_a_base_says_how_many_layers(saved: Callable[[str], Path]) -> None:
    source = saved("bert")
    cut, whole = (models.load(Base(str(source), "float32", layers=n)) for n in (1, None))
    assert cut.module.config.num_hidden_layers == 1
    assert whole.module.config.num_hidden_layers == 2
    assert cut.sha256 != whole.sha256
    assert cut.tokenizer_sha256 == whole.tokenizer_sha256


@pytest.mark.parametrize(("architecture", "layers", "told"), [
    ("llama", 3, r"layers = 3: .*llama has 2; choose 1 to 2"), ("t5", 1, "only those can be cut"),
    ("vit", 1, "only those can be cut"),
])  # fmt: skip
def test_what_cannot_be_cut_is_told(saved: Callable[[str], Path], architecture: str, layers: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        models.load(Base(str(saved(architecture)), "float32", layers=layers))


def test_the_tiny_model_is_not_cut() -> None:
    with pytest.raises(UserError, match="layers"):
        models.load(Base("tiny", layers=1))

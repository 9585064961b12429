"""Vision bases: what is pooled, whose pixels they see, what plain transformers and PEFT load, a whole run on pictures."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as pillow
from rich.console import Console
from safetensors.torch import load_file

import fedtailor
from fedtailor import models, preparing, whole, wire
from fedtailor.answering import fresh, trainable
from fedtailor.chatting import talk
from fedtailor.data import Row, SiloData
from fedtailor.errors import SiloError, UserError
from fedtailor.find import method as named
from fedtailor.images import Image
from fedtailor.methods.averaging import Adapted
from fedtailor.methods.head import Head
from fedtailor.models import Base, Resident
from fedtailor.tuned import stack
from test_added import begun, loaded, moved

PEFTS = ("lora", "ia3", "vera", "layernorm", "peft")


def values(rows: tuple[Row, ...]) -> torch.Tensor:
    """As ViT's own processor makes them of grey pictures of the right size."""
    found = torch.stack([torch.tensor(list(row.image.data)).view(1, 28, 28) for row in rows if row.image])
    return (found / 255 - 0.5) / 0.5


def told(module: Any, rows: tuple[Row, ...], head: Mapping[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        pooled = module(pixel_values=values(rows)).last_hidden_state.mean(1)
    return (pooled @ head["head.weight"].T + head["head.bias"]).log_softmax(-1)


def test_it_pools_the_mean_over_its_places(
    vit: Resident, plain: Callable[[str], Any], pictured: Mapping[str, SiloData]
) -> None:
    rows, labels = pictured["zoo"].train, pictured["zoo"].labels
    head = moved(begun(vit, Head(), 2))
    scores = Adapted(Head(), head, 2).open({"base": vit}).scores(rows, labels)
    expected = told(plain("vit"), rows, head)
    assert torch.allclose(scores, expected, atol=1e-5)
    items, make = trainable(vit, rows, labels)
    nll, places = Head().put_on(vit, 2).losses(head, make(items))
    assert places.item() == 6
    assert nll.item() == pytest.approx(-sum(expected[i, labels.index(row.answer)].item() for i, row in enumerate(rows)), abs=1e-4)


def test_batches_of_many_silos(vit: Resident, pictured: Mapping[str, SiloData]) -> None:
    some = []
    for silo in pictured.values():
        items, make = trainable(vit, silo.train[:2], silo.labels)
        some.append(make(items))
    both = stack(some, vit.pad_id)
    assert both.pixels.shape == (3, 2, 1, 28, 28)
    assert both.pixels.dtype == torch.uint8
    assert both.labels.shape == (3, 2)
    assert both.input_ids.shape == (3, 0)


@pytest.mark.parametrize("name", PEFTS)
def test_plain_peft_loads_it(
    vit: Resident, plain: Callable[[str], Any], pictured: Mapping[str, SiloData], tmp_path: Path, name: str
) -> None:
    from peft import PeftModel

    method, rows = named(name)(), pictured["shop"].test
    tensors = moved(begun(vit, method, 2))
    method.export(vit, tensors, tmp_path)
    theirs = PeftModel.from_pretrained(plain("vit"), tmp_path).eval()
    scores = Adapted(method, tensors, 2).open({"base": vit}).scores(rows, pictured["shop"].labels)
    assert torch.allclose(told(theirs, rows, load_file(tmp_path / "head.safetensors")), scores, atol=1e-4)


def test_plain_transformers_loads_a_fully_tuned_one(
    vit: Resident, pictured: Mapping[str, SiloData], tmp_path: Path
) -> None:
    from transformers import AutoModel

    method, rows = named("full")(), pictured["shop"].test
    tensors = {n: t + 0.02 * torch.randn_like(t) for n, t in begun(vit, method, 2).items()}
    method.export(vit, tensors, tmp_path)
    scores = Adapted(method, tensors, 2).open({"base": vit}).scores(rows, pictured["shop"].labels)
    theirs = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert torch.allclose(told(theirs, rows, load_file(tmp_path / "head.safetensors")), scores, atol=1e-5)


def test_a_folder_with_its_own_processor(vit: Resident, tmp_path: Path) -> None:
    """Pictures of any size are cut and scaled as the base's processor does it."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    module: Any = ViTModel(ViTConfig(**sizes, image_size=14, patch_size=7)).eval()
    module.save_pretrained(tmp_path)
    processor: Any = ViTImageProcessor(size={"height": 14, "width": 14}, image_mean=[0.2, 0.3, 0.4])
    processor.save_pretrained(tmp_path)
    base = models.load(Base(str(tmp_path), "float32"))
    assert (base.kind, base.classifier, base.tokenizer) == ("vision", True, None)
    picture = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    row = Row("", "a", image=Image(picture.tobytes(), (30, 20, 3)))
    head = moved(begun(base, Head(), 2))
    with torch.no_grad():
        pooled = module(**processor(images=picture, return_tensors="pt")).last_hidden_state.mean(1)
    expected = (pooled @ head["head.weight"].T + head["head.bias"]).log_softmax(-1)
    assert torch.allclose(Adapted(Head(), head, 2).open({"base": base}).scores([row], ["a", "b"]), expected, atol=1e-5)
    assert base.tokenizer_sha256 != vit.tokenizer_sha256


def test_rows_and_bases_that_do_not_fit(
    vit: Resident, bert: Resident, pictured: Mapping[str, SiloData], rated: Mapping[str, SiloData]
) -> None:
    preparing.fits(vit, pictured)
    preparing.fits(bert, rated)
    with pytest.raises(UserError, match=r"silo 'cafe': the base, tiny, looks at pictures; set data\.image"):
        preparing.fits(vit, rated)
    with pytest.raises(UserError, match=r"silo 'cafe': the base, tiny, reads text; set data\.template"):
        preparing.fits(bert, pictured)
    with pytest.raises(SiloError, match="a row has no picture"):
        fresh(vit, classes=2).scores(rated["zoo"].test, rated["zoo"].labels)
    message = r"p_tuning needs a causal model, an encoder or an encoder-decoder: ViTModel is a vision model; choose another "
    with pytest.raises(UserError, match=message):
        named("p_tuning")().put_on(vit, 2)
    with pytest.raises(UserError, match=r"head needs an encoder or a vision model: LlamaForCausalLM is a causal model"):
        Head().put_on(models.load(Base("tiny")), 0)


def test_a_whole_run_on_pictures(
    plain: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handwritten digits, zero or one, out of a JSONL file, on a base out of a folder: it learns to tell them."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    chosen = [(picture * 15, n) for picture, n in zip(digits.images, digits.target, strict=True) if n < 2]
    lines = [json.dumps({"picture": p.astype(int).tolist(), "digit": ("nought", "one")[n]}) for p, n in chosen]
    (tmp_path / "digits.jsonl").write_text("\n".join(lines))
    plain("vit").save_pretrained(tmp_path / "base")
    (tmp_path / "digits.toml").write_text(f"""
rounds = 12
rows = ["zero_shot", "few_shot", "federated"]
[model]
name = "{tmp_path}/base"
dtype = "float32"
[data]
source = "{tmp_path}/digits.jsonl"
image = "picture"
label = "digit"
partition = "iid"
silos = 3
[method]
name = "lora"
lr = 2e-2
""")
    result = fedtailor.run(str(tmp_path / "digits.toml"), out=str(tmp_path / "run"))
    accuracy = {row: result["rows"][row]["accuracy"]["mean"] for row in ("zero_shot", "federated")}
    assert accuracy["federated"] > 0.9 > 0.8 > accuracy["zero_shot"]
    assert result["rows"]["few_shot"]["accuracy"]["mean"] == accuracy["zero_shot"]  # examples are no part of a picture
    assert result["rows"]["federated"]["samples"][0]["prompt"] == "[image of 8 x 8]"
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert "from transformers import AutoModel, AutoImageProcessor" in page
    assert "[image of 8 x 8]" in page
    whole.export(tmp_path / "run", tmp_path / "merged", merge=True)
    merged = models.load(Base(str(tmp_path / "merged"), "float32"))
    rows = tuple(Row("", "", image=Image((p * 15).astype(np.uint8).tobytes(), (8, 8, 1))) for p in digits.images[:6])
    head = load_file(tmp_path / "merged" / "head.safetensors")
    served = wire.read_file(tmp_path / "run" / "adapter" / "served.safetensors")
    ours = served.open({"base": models.load(Base(str(tmp_path / "base"), "float32"))}).scores(rows, ["nought", "one"])
    theirs = Adapted(Head(), head, 2).open({"base": merged}).scores(rows, ["nought", "one"])
    assert torch.allclose(ours, theirs, atol=1e-4)
    # and says which a picture is
    files = []
    for word, picture in (("nought", digits.images[0]), ("one", digits.images[1])):
        files.append(f"{tmp_path}/{word}.png")
        pillow.fromarray((picture * 15).astype(np.uint8)).save(files[-1])
    for folder, base in ((tmp_path / "run" / "adapter", tmp_path / "base"), (tmp_path / "merged", None)):
        scores = loaded(folder).classifier(folder, base)
        assert scores.labels == ["nought", "one"]
        assert torch.allclose(scores(files), ours[:2], atol=1e-4)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join([*files, "no.png"])))
    out = io.StringIO()
    talk(tmp_path / "run", Console(file=out, width=1000), temperature=0, top_p=1, max_new_tokens=1, seed=0)
    assert out.getvalue().splitlines() == ["nought", "one", "[no image file 'no.png' (No such file or directory)]"]

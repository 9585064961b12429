"""What an exported folder says of its own use: the label words of a classifier, and a load.py that pools and scores as we do.

labels.json holds the words in the order of the head's outputs. load.py's `classifier(folder, base)` gives a function from texts
(pictures: files or Pillow's images) to log-probabilities, (rows, labels); its attribute `labels` holds the words.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtailor.files import write_json

if TYPE_CHECKING:
    from fedtailor.models import Resident


def classifier(resident: Resident, labels: Sequence[str], folder: Path) -> None:
    """labels.json and load.py beside a head.safetensors; where there is none, or no word is known, nothing."""
    from safetensors import safe_open

    if not labels or not (folder / "head.safetensors").exists():
        return
    write_json(folder / "labels.json", list(labels))
    file, config, places = folder / "load.py", folder / "adapter_config.json", 0
    if config.exists():
        text, places = LOAD_PEFT, json.loads(config.read_text(encoding="utf-8")).get("num_virtual_tokens") or 0
    elif file.exists():
        text = file.read_text(encoding="utf-8")
        with safe_open(folder / "added.safetensors", "pt") as added:
            places = sum(added.get_slice(n).get_shape()[0] for n in added.keys() if n.endswith("/places"))  # noqa: SIM118
    else:
        text = LOAD_BARE
    text = text.replace("import torch\n", "import json\n\nimport torch\n", 1)
    if resident.look is None:
        rest = TEXTS.replace("ROOM", str(resident.context - places))
    else:
        look = resident.look
        rest = PICTURES.replace("EXTRA", str(places)).replace("CHANNELS", str(look.channels))
        rest += PROCESSED if look.processor is not None else RESIZED
        rest = rest.replace("SIZE", str((look.width, look.height))).replace("NUMBERS", f"{look.scale}, {look.mean}, {look.std}")
    file.write_text(f"{text.rstrip()}\n{CLASSIFIER}{rest}", encoding="utf-8")


LOAD_PEFT = '''"""Puts what was learnt on a base that transformers has loaded: model = load(model, folder)."""

import torch
from peft import PeftModel
from safetensors.torch import load_file


def load(model, folder):
    return PeftModel.from_pretrained(model, folder)
'''
LOAD_BARE = '''"""The base as transformers loads it, and a head that tells the labels."""

import torch
from safetensors.torch import load_file


def load(model, folder):
    return model
'''
CLASSIFIER = '''

def classifier(folder, base=None):
    """classifier(folder, base)(rows) -> log-probabilities; base: what from_pretrained takes, by default the folder itself."""
    from transformers import AutoModel

    model = load(AutoModel.from_pretrained(base or folder, dtype=torch.float32), folder).eval()
    read, head = reader(base or folder), load_file(f"{folder}/head.safetensors")

    @torch.no_grad()
    def scores(rows):
        pooled = pool(model, read(rows)).cpu()
        return (pooled @ head["head.weight"].T + head["head.bias"]).log_softmax(-1)

    with open(f"{folder}/labels.json", encoding="utf-8") as file:
        scores.labels = json.load(file)
    return scores
'''
TEXTS = '''

def reader(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    how = {"padding": True, "padding_side": "right", "truncation": True, "max_length": ROOM, "return_tensors": "pt"}
    return lambda texts: tokenizer(list(texts), **how)


def pool(model, read):  # the mean over the texts' own tokens, without what stands in front of them
    ids, mask = read["input_ids"].to(model.device), read["attention_mask"].to(model.device)
    more = {}
    if not getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):  # that counts by itself
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    states = model(input_ids=ids, attention_mask=mask, **more).last_hidden_state[:, -ids.shape[1] :]
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
'''
PICTURES = '''

def pool(model, values):  # the mean over all places, but not over trained ones behind the first
    states = model(pixel_values=values.to(model.device)).last_hidden_state
    if states.dim() == 4:
        states = states.flatten(2).transpose(1, 2)
    return torch.cat([states[:, :1], states[:, 1 + EXTRA :]], dim=1).mean(1)


def opened(picture):  # (height, width, channels)
    import numpy
    from PIL import Image

    picture = picture if isinstance(picture, Image.Image) else Image.open(picture)
    values = numpy.array(cut(picture.convert("L" if CHANNELS == 1 else "RGB")))
    return values.reshape(*values.shape[:2], CHANNELS)
'''
PROCESSED = '''

def reader(base):
    from transformers import AutoImageProcessor

    how = {"input_data_format": "channels_last", "return_tensors": "pt"}
    process = AutoImageProcessor.from_pretrained(base)
    return lambda pictures: torch.cat([process(images=opened(one), **how)["pixel_values"] for one in pictures])


def cut(picture):  # the base's own processor does
    return picture
'''
RESIZED = '''

def reader(base):
    scale, mean, std = NUMBERS
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (mean, std))
    return lambda rows: torch.stack([(torch.tensor(opened(p)).permute(2, 0, 1) * scale - mean) / std for p in rows])


def cut(picture):
    return picture.resize(SIZE, resample=2)
'''

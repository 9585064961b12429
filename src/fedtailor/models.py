"""Base models: found by name, folder or hub id, loaded once per process, frozen, and handed to every silo.

A name of `packaged.PACKAGED`, or what `from_pretrained` takes: a local folder or a hub id.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from fedtailor import added, images, shallow
from fedtailor.before import Before
from fedtailor.errors import SiloError, UserError, suggest
from fedtailor.packaged import PACKAGED, folder
from fedtailor.seq2seq import EncoderDecoder
from fedtailor.tuned import ATTENTION, Tuned
from fedtailor.vision import Looking

Kind = Literal["causal", "encoder", "vision", "seq2seq"]
RELATIVE = 512  # tokens that are read and said where positions are relative, as T5's are: what T5 was trained on
Dtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Base:
    """The [model] part of an experiment."""

    name: str = "smollm2-135m"  # a packaged model, a local folder, a hub id, or "tiny": random weights, for trying
    dtype: Dtype = "auto"  # auto: bfloat16 where the processor computes in it, else float32
    revision: str | None = None  # of a hub id
    layers: Annotated[int, Field(ge=1)] | None = None  # so many of its layers, evenly spaced, make a smaller base; None: all


@dataclass
class Resident:
    """One loaded base with its tokenizer. Frozen; adapters are put on and taken off, never a copy made."""

    module: Any  # transformers model
    tokenizer: Any  # None of a vision model
    source: str  # what `from_pretrained` takes
    sha256: str  # over the weights: two silos with equal hashes have equal bases
    tokenizer_sha256: str  # over its vocabulary, rules, marks and chat template; of a vision model over its `look`
    kind: Kind
    plan: added.Plan = field(default_factory=dict)  # its modules before anything is put on
    look: images.Look | None = None  # of a vision model
    _tuned: dict[str, Tuned] = field(default_factory=dict)
    _before: Before | None = None  # what PEFT went on

    @property
    def device(self) -> torch.device:
        return torch.device(self.module.device)

    @property
    def quantized(self) -> bool:
        """Some weights are integers with a rule of their own (bitsandbytes and its like): used, never changed."""
        return bool(getattr(self.module, "is_quantized", False))

    @property
    def classifier(self) -> bool:
        """Scored by a head over its mean-pooled states; else it writes."""
        return self.kind in ("encoder", "vision")

    @property
    def task(self) -> str | None:
        """As PEFT calls it. None for an encoder-decoder: its class for those asks transformers for a name that newer ones have
        no more, and all that it does beyond the plain class is for virtual tokens."""
        return {"causal": "CAUSAL_LM", "seq2seq": None}.get(self.kind, "FEATURE_EXTRACTION")

    @property
    def pad_id(self) -> int:
        return 0 if self.tokenizer is None else int(self.tokenizer.pad_token_id)

    @property
    def context(self) -> int:
        """The longest row in tokens; pictures are of one size, and have all the room they need."""
        if self.kind == "vision":
            return 2**31
        config = self.module.config
        if self.kind == "seq2seq" and not hasattr(config, "n_positions") and not hasattr(config, "max_position_embeddings"):
            return min(int(self.tokenizer.model_max_length), RELATIVE)
        return int(getattr(config, "max_position_embeddings", 0) or config.n_positions)

    def save_reader(self, folder: Path) -> None:
        """What turns rows into the model's input: the tokenizer, or the image processor where there is one."""
        reader = self.tokenizer if self.look is None else self.look.processor
        if reader is not None:
            reader.save_pretrained(folder)

    def tuned(self, config: Any = None, classes: int = 0) -> Tuned:
        """The base with a PEFT config on it (None: the base alone, all weights nameable). Kept until another is asked.

        `classes` is the width of an encoder's head. Raises UserError when the architecture cannot take the config.
        """
        key = json.dumps([None if config is None else config.to_dict(), classes], default=str, sort_keys=True)
        if key not in self._tuned:
            for old in self._tuned.values():  # what is put into the base is taken out before another goes on
                if old.added is not None:
                    old.added.take_off()
                elif self._before is not None:
                    self._before.put_back()
            self._before = None
            self._tuned.clear()
            self._tuned[key] = self._put_on(config, classes)
        return self._tuned[key]

    def _put_on(self, config: Any, classes: int) -> Tuned:
        inner, more = self.module, None
        if hasattr(config, "attach"):
            more = config.attach(self.module)
        elif config is not None:
            inner = self._with_peft(config)
        head = None
        if self.classifier:
            head = nn.Linear(self.module.config.hidden_size, max(classes, 1), device=self.device)
            nn.init.zeros_(head.weight)  # zero: every label equally likely before the first step
            nn.init.zeros_(head.bias)
        if self.look is not None:
            made: Tuned = Looking(inner, head=head, added=more, look=self.look)
        else:
            made = (EncoderDecoder if self.kind == "seq2seq" else Tuned)(inner, head=head, added=more)
        if more is not None and more.loader:
            self._tried(made, more)
        return made

    def _with_peft(self, config: Any) -> Any:
        import peft

        before, what = Before(self.module), config.peft_type.value
        with torch.random.fork_rng():
            torch.manual_seed(0)  # initial values are drawn by the method, from the experiment's seed
            try:
                with before.watched():
                    inner = peft.get_peft_model(self.module, config)
            except Exception as error:  # PEFT raises many kinds, and may have put on half of it
                before.put_back()
                kind = type(self.module).__name__
                raise UserError(f"[method] {what} does not fit {kind}: {one_line(error)}") from error
        if name := before.changed():
            before.put_back()
            raise UserError(
                f"[method] {what}: these settings change the base's own weights before training, first {name}, and all silos "
                "and rows share them; choose an initialisation that leaves them (of LoRA: init_lora_weights = true)"
            )
        self._before = before
        return inner

    def _tried(self, made: Tuned, more: added.Added) -> None:
        """What is put in front must be read by every layer that it is meant for. Raises UserError."""
        one = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        row: tuple[Any, ...] = (one, one + 1, one) if self.kind == "seq2seq" else (one, one + 1, one, 1)
        if self.look is not None:
            shape = self.look.channels, self.look.height, self.look.width
            row = (torch.zeros(1, *shape, dtype=torch.uint8, device=self.device),)
        try:
            with torch.no_grad():
                made(*row)
            why = "" if not more.unused else f"{sorted(more.unused)[0]} does not call transformers' attention interface"
        except RuntimeError as error:
            why = _first_line(error)
        if why:
            more.take_off()
            kind = type(self.module).__name__
            raise UserError(f"[method] {kind} takes nothing in front of its own: {why}; choose another method")


def load(base: Base) -> Resident:
    """The resident of this source, revision and dtype: loaded the first time, the same object afterwards."""
    return _load(base.name, best_dtype() if base.dtype == "auto" else base.dtype, base.revision, base.layers)


def fresh(base: Base) -> Resident:
    """The same base read once more, in fp32, for its reader to change."""
    return _load.__wrapped__(base.name, "float32", base.revision, base.layers)


def loads() -> int:
    """How many bases this process has loaded so far."""
    return _load.cache_info().misses


def best_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 where it is computed natively, which is about twice as fast; elsewhere it would be emulated."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bfloat16" if check is not None and check() else "float32"


@cache
def _load(name: str, dtype: str, revision: str | None, layers: int | None) -> Resident:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if name == "tiny":
        from fedtailor.tiny import tiny

        if layers is not None:
            raise UserError("[model] layers: tiny is made with two; leave it out, or choose another base")
        return tiny(dtype)
    source = str(folder(name)) if name in PACKAGED else name
    try:
        if layers is not None:
            source, revision = str(shallow.folder(source, revision, layers)), None
        config = AutoConfig.from_pretrained(source, revision=revision)
        causal = any("CausalLM" in a or "LMHead" in a for a in config.architectures or [])
        kind: Kind = "seq2seq" if config.is_encoder_decoder else "causal" if causal else "encoder"
        auto: Any = {"seq2seq": AutoModelForSeq2SeqLM, "causal": AutoModelForCausalLM}.get(kind, AutoModel)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        how = {"dtype": getattr(torch, dtype), "attn_implementation": ATTENTION}
        if quantized := getattr(config, "quantization_config", None) is not None:  # such weights cannot be moved later
            how["device_map"] = device
        read = partial(auto.from_pretrained, source, revision=revision, **how)
        module = without_pooler(read) if hasattr(config, "num_channels") else read()
        module = module if quantized else module.to(device)
        if module.main_input_name == "pixel_values":
            if not hasattr(config, "hidden_size"):
                raise ValueError("its config has no hidden_size, so it is no vision transformer")
            return resident(module, None, source=source, kind="vision", look=_look(source, revision, config))
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except ImportError as error:
        more = "; pip install 'fedtailor[quantized]'" if "bitsandbytes" in str(error) else ""
        raise UserError(f"[model] name = {name!r}: it needs a package that is not here: {_first_line(error)}{more}") from error
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a missing, damaged or foreign model
        known = {*PACKAGED, "tiny"}
        where = (
            "damaged or of an unknown kind"
            if Path(source).is_dir()
            else f"no model, folder or reachable hub id{suggest(name, known)}"
        )
        raise UserError(f"[model] name = {name!r}: {where}: {_first_line(error)}") from error
    return resident(module, tokenizer, source=source, kind=kind)


def without_pooler(read: Callable[..., Any]) -> Any:
    """Vision models often come without the pooler's weights, and we read none: it would be made at random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            return read(add_pooling_layer=False)
        except TypeError:  # it has none that could be left out
            return read()


def _look(source: str, revision: str | None, config: Any) -> images.Look:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, revision=revision)
    except (OSError, ImportError):  # it brings none
        processor = None
    return images.look_of(config, processor)


def resident(module: Any, tokenizer: Any, *, source: str, kind: Kind, look: images.Look | None = None) -> Resident:
    """Freeze a loaded transformers model and make it a resident."""
    module.eval().requires_grad_(False)
    for layer in module.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # bitsandbytes would pack 4-bit weights for use alone at the first
            layer.support_avx512bf16_for_cpu = False  # scoring, and no gradient would come through them afterwards
    if kind == "causal":
        # the last places of a batch are a strided view, for which matmul would copy the output weights once per row
        module.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    if tokenizer is not None and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked by the attention mask, never found by its id
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    reader = _tokenizer_sha256(tokenizer) if look is None else look.sha256()
    return Resident(module, tokenizer, source, digest.hexdigest(), reader, kind, added.plan(module), look)


def _tokenizer_sha256(tokenizer: Any) -> str:
    """As it is loaded: use changes what it says of padding."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(fast.to_str()) if fast is not None else tokenizer.get_vocab()
    told = {k: v for k, v in rules.items() if k not in ("padding", "truncation")} if fast is not None else rules
    marks = {name: str(mark) for name, mark in tokenizer.special_tokens_map.items()}
    whole = json.dumps([told, marks, getattr(tokenizer, "chat_template", None)], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of the libraries that decide what is computed."""
    return {"torch": torch.__version__, **{name: importlib.metadata.version(name) for name in ("transformers", "peft")}}


def one_line(error: BaseException) -> str:
    """What another library said, on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def texts(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """Chat turns as the text that the model was trained to answer. Raises SiloError where its template refuses them."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise SiloError(f"the model's chat template does not take turns of {roles}: {error}") from error

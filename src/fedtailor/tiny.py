"""Models of random weights, made in code in milliseconds: for `experiments/tiny.toml` and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fedtailor import images
from fedtailor.tuned import ATTENTION

if TYPE_CHECKING:
    from fedtailor.models import Kind, Resident

KINDS: dict[str, Kind] = {"llama": "causal", "gpt2": "causal", "bert": "encoder", "vit": "vision", "t5": "seq2seq"}


def tiny(dtype: str = "float32", architecture: str = "llama") -> Resident:
    """Two layers of width 32, over 259 byte tokens or grey pictures of 28 x 28. `architecture`: one of `KINDS`."""
    from fedtailor.models import resident

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _module(architecture)
    module = module.to(getattr(torch, dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = KINDS[architecture]
    look = images.look_of(module.config) if kind == "vision" else None
    tokenizer = None if kind == "vision" else byte_tokenizer()
    return resident(module.to(device), tokenizer, source="tiny", kind=kind, look=look)


def _module(architecture: str) -> Any:
    import transformers

    hf: Any = transformers
    common: dict[str, Any] = {"vocab_size": 260, "attn_implementation": ATTENTION}
    marks = {"pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 257}
    if architecture == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **common, **marks)
        return hf.GPT2LMHeadModel(config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    if architecture == "vit":
        seen = {"image_size": 28, "patch_size": 7, "num_channels": 1, "attn_implementation": ATTENTION}
        return hf.ViTModel(hf.ViTConfig(**sizes, **seen), add_pooling_layer=False)
    if architecture == "t5":
        said = {"pad_token_id": 256, "eos_token_id": 257, "decoder_start_token_id": 256, "n_positions": 512, "dropout_rate": 0.0}
        t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        return hf.T5ForConditionalGeneration(hf.T5Config(**t5, **common, **said))
    if architecture == "bert":
        return hf.BertModel(hf.BertConfig(**sizes, **common, pad_token_id=256, max_position_embeddings=512))
    config = hf.LlamaConfig(
        **sizes, **common, **marks, num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True
    )
    return hf.LlamaForCausalLM(config)


def byte_tokenizer() -> Any:
    """One token per byte, then pad 256, end 257, unknown 258: no files, no vocabulary to train."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    # ByteLevel writes each byte as one printable character; the sorted alphabet of them is the vocabulary
    vocabulary = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    marks = ["<pad>", "<end>", "<unk>"]
    vocabulary |= {mark: 256 + i for i, mark in enumerate(marks)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
    return fast

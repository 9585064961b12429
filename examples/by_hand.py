"""Federated averaging of a prefix by hand, without the library: what `fedtailor run` does, on one screen.

    python examples/by_hand.py
"""

from __future__ import annotations

import copy

import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64
)
base = LlamaForCausalLM(config)
model = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))

# three silos; each counts in steps of its own, and none ever shows a row
silos = {f"silo {step}": torch.arange(0, 60, step)[None, :20] for step in (1, 2, 3)}


def trainable() -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load(tensors: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, p in trainable().items():
            p.copy_(tensors[name])


def train(rows: torch.Tensor, steps: int = 5) -> float:
    optimizer = torch.optim.AdamW(trainable().values(), lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


state = copy.deepcopy({name: p.detach() for name, p in trainable().items()})
for number in range(1, 6):
    deltas, losses = [], []
    for rows in silos.values():
        load(state)  # down: the tensors
        losses.append(train(rows))
        deltas.append({name: p.detach() - state[name] for name, p in trainable().items()})  # up: what changed
    state = {name: t + sum(d[name] for d in deltas) / len(deltas) for name, t in state.items()}
    print(f"round {number}: mean loss {sum(losses) / len(losses):.3f}")

"""Train with PEFT on 4-bit layers: python examples/peft_adapters.py MODEL TEXT ADAPTER"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kernels import NF4Config, PagedAdamW


def main(model_name: str, text_file: str, adapter: str, steps: int = 100, length: int = 256) -> list[float]:
    # No rank here: the adapters are PEFT's.
    model = AutoModelForCausalLM.from_pretrained(model_name, quantization_config=NF4Config())
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    tokens = AutoTokenizer.from_pretrained(model_name)(Path(text_file).read_text(), return_tensors="pt").input_ids[0]
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4)
    losses = []
    for _ in range(steps):
        begins = torch.randint(len(tokens) - length, (4,)).tolist()
        batch = torch.stack([tokens[begin : begin + length] for begin in begins])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.save_pretrained(adapter)
    return losses


if __name__ == "__main__":
    print(f"last loss {main(*sys.argv[1:])[-1]:.3f}")

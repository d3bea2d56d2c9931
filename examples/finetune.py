"""Fine-tune a Hugging Face model in ten lines: python examples/finetune.py MODEL TEXT ADAPTER"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_kernels import PagedAdamW, quantize_model, save_adapter


def main(model_name: str, text_file: str, adapter: str, length: int = 256) -> list[float]:
    losses = []
    model = AutoModelForCausalLM.from_pretrained(model_name)
    tokens = AutoTokenizer.from_pretrained(model_name)(Path(text_file).read_text(), return_tensors="pt").input_ids[0]
    print(quantize_model(model, rank=16, alpha=32))
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, max_grad_norm=1.0)
    for batch in tokens.unfold(0, length, length).split(2):
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    save_adapter(model, adapter)
    return losses


if __name__ == "__main__":
    print(f"last loss {main(*sys.argv[1:])[-1]:.3f}")

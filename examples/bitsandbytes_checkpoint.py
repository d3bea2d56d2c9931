"""Use a model that bitsandbytes has quantized: python examples/bitsandbytes_checkpoint.py CHECKPOINT OUT

CHECKPOINT is what save_pretrained wrote for a model with BitsAndBytesConfig(load_in_4bit=True). Its weights are taken
as they are. OUT is the same model for plain from_pretrained after `import qlora_kernels`, without bitsandbytes.
"""

import sys

import torch
from transformers import AutoModelForCausalLM

from qlora_kernels import load_quantized


def main(checkpoint: str, out: str) -> float:
    model = load_quantized(checkpoint, rank=0)
    model.save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out)
    tokens = torch.arange(16).unsqueeze(0)
    with torch.no_grad():
        return (again(tokens).logits - model(tokens).logits).abs().max().item()


if __name__ == "__main__":
    print(f"largest difference after saving and loading: {main(*sys.argv[1:])}")

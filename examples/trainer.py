"""Fine-tune a Hugging Face model with transformers' Trainer: python examples/trainer.py MODEL TEXT ADAPTER"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from qlora_kernels import NF4Config, PagedAdamW, save_adapter


def main(model_name: str, text_file: str, adapter: str, steps: int = 100, length: int = 256) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(model_name, quantization_config=NF4Config(rank=16, alpha=32))
    tokens = AutoTokenizer.from_pretrained(model_name)(Path(text_file).read_text()).input_ids
    pieces = [tokens[begin : begin + length] for begin in range(0, len(tokens) - length + 1, length)]
    trainer = Trainer(
        model,
        TrainingArguments(
            f"{adapter}.trainer",
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            logging_steps=1,
            save_strategy="no",  # save_adapter keeps the adapter; a checkpoint would hold the 4-bit base as well
            report_to="none",
        ),
        train_dataset=[{"input_ids": piece, "labels": piece} for piece in pieces],
        optimizer_cls_and_kwargs=(PagedAdamW, {"lr": 2e-4, "state_bits": 8}),
    )
    trainer.train()
    save_adapter(model, adapter)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(f"last loss {main(*sys.argv[1:])[-1]:.3f}")

"""transformers' Trainer, TRL and Lightning train QLinear's own adapters, and resume from their checkpoints."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from small.llama import CONFIG, IDS, logits
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from qlora_kernels import NF4Config, PagedAdamW, QLinear
from qlora_kernels.models.targets import qlora_layers

pytest.importorskip("accelerate")

ROWS = [{"input_ids": row, "labels": row} for row in torch.arange(96).view(12, 8).remainder(64).tolist()]


@pytest.fixture
def dense(tmp_path) -> str:
    torch.manual_seed(3)
    LlamaForCausalLM(copy.deepcopy(CONFIG)).save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def load(folder, **options):
    torch.manual_seed(5)
    config = NF4Config(**{"rank": 4, "alpha": 32, "dropout": 0.1, **options})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def arguments(folder, **options):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**settings, **options})


PAGED = (PagedAdamW, {"lr": 1e-2, "state_bits": 8})


def trainer(model, folder, optimizer=PAGED, **options):
    return Trainer(
        model, arguments(folder, **options), train_dataset=ROWS, eval_dataset=ROWS, optimizer_cls_and_kwargs=optimizer
    )


def losses(trained):
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


@pytest.mark.parametrize("optimizer", [PAGED, None])
def test_trainer_resumes_exactly(dense, tmp_path, optimizer):
    whole = trainer(load(dense), tmp_path / "run", optimizer)
    before = {name: layer.weight_packed.clone() for name, layer in qlora_layers(whole.model)}
    whole.train()
    assert losses(whole)[-1] < losses(whole)[0]
    assert isinstance(whole.optimizer.optimizer, PagedAdamW) == (optimizer is not None)
    resumed = trainer(load(dense), tmp_path / "again", optimizer)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    first, second = whole.model.state_dict(), resumed.model.state_dict()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert all(torch.equal(layer.weight_packed, before[name]) for name, layer in qlora_layers(whole.model))
    # A checkpoint is a folder like any other.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(whole.model.eval()))


@pytest.mark.slow
def test_trainer_loads_the_best_model(dense, tmp_path, monkeypatch):
    trained = trainer(
        load(dense),
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        optimizer=None,
    )
    evaluate = trained.evaluate
    # Each is worse than the one before.
    monkeypatch.setattr(
        trained, "evaluate", lambda **more: {**evaluate(**more), "eval_loss": trained.state.global_step}
    )
    trained.train()
    assert trained.state.global_step == 4
    assert trained.state.best_model_checkpoint.endswith("checkpoint-2")
    loaded = AutoModelForCausalLM.from_pretrained(trained.state.best_model_checkpoint)
    assert torch.equal(logits(loaded), logits(trained.model.eval()))


@pytest.mark.slow
def test_trl_trains_adapters(dense, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model = load(dense)
    given = arguments(tmp_path / "run").to_dict()
    given = {key: given[key] for key in ("max_steps", "learning_rate", "report_to", "use_cpu", "logging_steps")}
    trained = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(tmp_path / "run"), **given, per_device_train_batch_size=2, save_steps=4, bf16=False),
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=tokenizer(),
        optimizer_cls_and_kwargs=PAGED,
    )
    trained.train()
    assert losses(trained)[-1] < losses(trained)[0]
    assert all(type(layer) is QLinear for _, layer in qlora_layers(trained.model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert torch.equal(logits(loaded), logits(model.eval()))


@pytest.mark.slow
def test_trl_prefers_with_a_4bit_reference(dense, tmp_path):
    """DPO compares with a second model. Given none, it loads the folder that the first came from, in its own type."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}] * 4
    reference = AutoModelForCausalLM.from_pretrained(dense, quantization_config=NF4Config())
    trained = trl.DPOTrainer(
        model=load(dense),
        ref_model=reference,
        args=trl.DPOConfig(
            str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            learning_rate=1e-2,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    trained.train()
    assert losses(trained)[1] < losses(trained)[0]
    assert len(list(qlora_layers(trained.ref_model))) == 14


def tokenizer():
    """Characters for tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, **{chr(97 + i): i + 2 for i in range(26)}}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.slow
def test_lightning_trains_and_resumes(dense, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = load(dense, dropout=0.0)
            self.losses = []

        def training_step(self, batch, _):
            loss = self.model(batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return PagedAdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def fit(steps, checkpoint=None):
        module = Module()
        run = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=str(tmp_path),
        )
        run.fit(module, DataLoader(IDS.repeat(4, 1), batch_size=2), ckpt_path=checkpoint)
        return module, run

    whole, _ = fit(4)
    _, run = fit(2)
    path = os.path.join(tmp_path, "half.ckpt")
    run.save_checkpoint(path)
    resumed, _ = fit(4, path)
    assert resumed.losses == whole.losses[2:]
    assert whole.losses[-1] < whole.losses[0]

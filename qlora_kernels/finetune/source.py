"""Base models: the tiny one, a Hugging Face folder or id, or a folder that is 4-bit already."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..console.quiet import quiet_transformers
from ..errors import InputError, readable, sentence
from ..interop.transformers.folder import METHOD, read_config
from ..interop.transformers.skeleton import cast_parameters, dtype_argument, skeleton, skipped
from ..models.quantize import QuantizeReport, quantize_model
from ..models.targets import qlora_layers
from ..ops import backends
from . import tiny
from .dense_lora import share_initial_values
from .options import Options


def compute_dtype(options: Options) -> torch.dtype:
    """The type of activations: bfloat16 where there are instructions for it, since elsewhere float32 is faster."""
    if options.compute != "auto":
        return getattr(torch, options.compute)
    if options.device.startswith("cuda"):
        return torch.bfloat16
    flags: set[str] = set()
    with contextlib.suppress(OSError):
        flags = set(Path("/proc/cpuinfo").read_text().split())
    return torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32


class Source:
    """Where the base comes from, and how to load it afresh.

    Attributes:
        folder: what transformers loads: a folder or an id; for the tiny model it exists after pretraining.
        four_bit: whether it is a folder that ``qlora-kernels quantize`` wrote.
        dtype: the type of activations.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        _check_device(options.device)
        self.dtype = compute_dtype(options)
        self.folder = tiny.cache_folder(options, self.dtype) if options.is_tiny else options.model
        settings = {} if options.is_tiny else _quantization(options.model)
        self.four_bit = settings.get("quant_method") == METHOD
        if self.four_bit:
            nested = bool(settings.get("double_quant", True))
            if nested and not options.double_quant:
                raise InputError(
                    f"--no-double-quant comes too late: {options.model} is 4-bit and double-quantized already; give "
                    "it to 'qlora-kernels quantize' instead, with the dense model"
                )
            options.double_quant = nested  # for metrics.json
        self._config = None if options.is_tiny else _load_config(options.model)
        self._tokenizer = None if options.is_tiny else _load_tokenizer(options.model)

    @property
    def end(self) -> int | None:
        """The id that ends a document."""
        return tiny.END if self._tokenizer is None else self._tokenizer.eos_token_id

    def encode(self, text: str, document: bool) -> list[int]:
        if self._tokenizer is None:
            return tiny.encode(text)
        return self._tokenizer(text, add_special_tokens=document, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return bytes(i for i in ids if i < tiny.END).decode("utf-8", errors="replace")
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def check(self) -> None:
        """Checks targets and ranks on a model without memory, before anything is loaded or written.

        Raises:
            InputError: naming what does not fit.
        """
        config = tiny.config(self.options) if self._config is None else self._config
        with readable(f"--model {self.options.model}"):
            model = skeleton(config)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and self.options.seq_len > longest:
            raise InputError(f"--seq-len {self.options.seq_len} is more than the {longest} tokens that the model takes")
        quantize(model, self.options)

    def load(self) -> nn.Module:
        """A dense model with 16-bit weights, ready for activations of ``dtype``; or a 4-bit one with fresh adapters.

        Raises:
            InputError: for files that are missing, damaged or do not belong together, and for non-finite weights.
        """
        from transformers import AutoModelForCausalLM

        name = self.options.model if not self.options.is_tiny else self.folder
        if self.four_bit:
            from ..interop.transformers.load import load_quantized

            with readable(f"--model {name}"):
                model = load_quantized(
                    name,
                    rank=self.options.rank,
                    alpha=self.options.alpha,
                    dropout=self.options.lora_dropout,
                    rslora=self.options.rslora,
                    target_modules=self.options.targets(),
                    adapter_dtype=torch.float32,
                    dtype=self.dtype,
                    device=self.options.device,
                )
            return model.eval()
        with readable(f"--model {name}"), quiet_transformers():
            model, info = AutoModelForCausalLM.from_pretrained(
                self.folder, output_loading_info=True, **dtype_argument(torch.bfloat16)
            )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise InputError(f"--model {name} lacks {len(missing)} tensors of its architecture, first {missing[0]}")
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(f"--model {name}: {key} holds NaN or infinity; only finite weights can be used")
        # In float32 the values stay those of the 16-bit weights.
        return cast_parameters(model, self.dtype).to(self.options.device).eval()


def quantize(model: nn.Module, options: Options) -> QuantizeReport:
    """Quantizes in place, unless the model is 4-bit; adapters in float32, with the 16-bit baseline's initial values.

    Raises:
        InputError: for target modules that match nothing, a rank larger than a layer, non-finite weights.
    """
    if any(True for _ in qlora_layers(model)):
        report = _already_quantized(model)
    else:
        report = _quantize(model, options)
    layers = dict(qlora_layers(model))
    if not any(tensor.is_meta for tensor in model.parameters()):
        share_initial_values({name: layers[name] for name in report.adapted}, options.seed)
    return report


def _quantize(model: nn.Module, options: Options) -> QuantizeReport:
    with readable("cannot quantize the model"):
        return quantize_model(
            model,
            rank=options.rank,
            alpha=options.alpha,
            dropout=options.lora_dropout,
            rslora=options.rslora,
            target_modules=options.targets(),
            skip=skipped(model),
            double_quant=options.double_quant,
            adapter_dtype=torch.float32,
            progress=False,
        )


def _already_quantized(model: nn.Module) -> QuantizeReport:
    layers = dict(qlora_layers(model))
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    return QuantizeReport(
        quantized=list(layers),
        adapted=[name for name, layer in layers.items() if layer.active_adapter is not None],
        bytes_before=size,
        bytes_after=size,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=sum(layer.weight.numel() for layer in layers.values())
        + sum(p.numel() for p in model.parameters() if p.is_floating_point()),
    )


def digest(model: nn.Module) -> str:
    """A digest of a base's names, shapes and a sample of its values, to recognise it by; adapters do not count."""
    result = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_A." in name or ".lora_B." in name:
            continue
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // 1024, 1)].contiguous().cpu()
        result.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        result.update(sample.view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _load_config(model: str):
    from transformers import AutoConfig

    with readable(f"--model {model}"):
        return AutoConfig.from_pretrained(model)


def _load_tokenizer(model: str):
    from transformers import AutoTokenizer

    with readable(f"--model {model} has no usable tokenizer"):
        return AutoTokenizer.from_pretrained(model)


def _check_device(device: str) -> None:
    """
    Raises:
        InputError: for a device that is unknown, absent, or that this build has no kernels for.
    """
    try:
        probe = torch.empty(1, device=device)
        if probe.is_meta:
            raise InputError(f"--device {device} cannot be used: it has no memory")
        backends.backend_for(probe)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device {device} cannot be used: {sentence(error)}") from None


def _quantization(model: str) -> dict[str, Any]:
    """What a folder's config says of its quantization; nothing for an id.

    Raises:
        InputError: when ``model`` looks like a folder and is none (rather than an id that is unknown), or holds no
            model.
    """
    if os.path.isdir(model):
        return read_config(model, "--model ").get("quantization_config") or {}
    if os.path.exists(model):
        raise InputError(f"--model {model} is a file; a Hugging Face folder or id was expected")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"--model {model}: no such folder")
    return {}

"""Base models: the tiny one, a Hugging Face folder or id, or a 4-bit folder."""

from __future__ import annotations

import hashlib
import os
from typing import Any, cast

import torch
from torch import nn

from ..console.quiet import quiet_transformers
from ..errors import InputError, readable, sentence
from ..interop.transformers.bitsandbytes_folder import is_bitsandbytes
from ..interop.transformers.folder import METHOD, read_config
from ..interop.transformers.skeleton import cast_parameters, dtype_argument, is_causal, load_config, skeleton, skipped
from ..layers.adapters.config import AdapterConfig
from ..models.experts import adapted_layers, experts_layers
from ..models.quantize import QuantizeReport, bytes_of, count_parameters, quantize_model
from ..models.targets import plan, qlora_layers
from ..ops import backends
from ..storage.regular_file import open_regular
from . import tiny
from .data import Chat
from .dense_lora import share_initial_values
from .options import Settings
from .tiny_forward import speed_up


class Source:
    """Where the base comes from, and how to load a fresh copy of it.

    Attributes:
        folder: what transformers loads: a folder or an id; for the tiny model, the folder that pretraining writes.
        four_bit: whether it is a folder that ``qlora-kernels quantize`` wrote, or one in 4 bits by bitsandbytes.
        double_quant: whether the run's 4-bit weights are double-quantized; a 4-bit folder decides that itself.
        dtype: the type of activations.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        _check_device(settings.device)
        self.dtype = settings.activation_dtype
        self.folder = tiny.cache_folder(settings) if settings.is_tiny else settings.model
        quantization = {} if settings.is_tiny else _quantization(settings.model)
        self._of_bitsandbytes = of_bitsandbytes = is_bitsandbytes(quantization, f"--model {settings.model}")
        self.four_bit = of_bitsandbytes or quantization.get("quant_method") == METHOD
        self.double_quant = settings.double_quant
        if self.four_bit:
            key, usual = ("bnb_4bit_use_double_quant", False) if of_bitsandbytes else ("double_quant", True)
            self.double_quant = bool(quantization.get(key, usual))
            if self.double_quant and not settings.double_quant:
                raise InputError(
                    f"--no-double-quant comes too late: {settings.model} is 4-bit and double-quantized already; give "
                    "it to 'qlora-kernels quantize' instead, with the dense model"
                )
        else:
            _refuse_quantized(settings.model, quantization)
        self._config = None if settings.is_tiny else _load_config(settings.model)
        if self._config is not None and not self.four_bit:  # an id has its config elsewhere
            _refuse_quantized(settings.model, getattr(self._config, "quantization_config", None))
        if self._config is not None and not is_causal(self._config):
            raise InputError(
                f"--model {settings.model} is a {self._config.architectures[0]}; finetune trains models that predict "
                "the next token. Quantize this one with quantize_model, and train it with a loop of your own"
            )
        self._tokenizer = None if settings.is_tiny else _load_tokenizer(settings.model)

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

    def chat(self) -> Chat | None:
        """The chat template: that of ``--chat-template``, or the tokenizer's; None when it has none.

        Raises:
            InputError: for a file that cannot be read, and a tokenizer that cannot say where a token stands.
        """
        settings = self.settings
        tokenizer = tiny.tokenizer() if self._tokenizer is None else self._tokenizer
        if settings.chat_template is not None:
            template, name = _read_template(settings.chat_template), f"--chat-template {settings.chat_template}"
        elif settings.is_tiny:
            template, name = tiny.CHAT_TEMPLATE, "the chat template of the tiny model"
        elif getattr(tokenizer, "chat_template", None):
            template, name = None, "the tokenizer's chat template"
        else:
            return None
        if not getattr(tokenizer, "is_fast", False):
            raise InputError(
                f"--model {settings.model} has a tokenizer without offsets, so the assistant's tokens cannot be found; "
                "give pairs of 'prompt' and 'completion' instead of messages"
            )
        return Chat(tokenizer, template, name)

    def check(self) -> None:
        """Checks targets and ranks on a model without memory, before anything is loaded or written.

        Raises:
            InputError: naming what does not fit.
        """
        config = tiny.config(self.settings) if self._config is None else self._config
        with readable(f"--model {self.settings.model}"):
            model = skeleton(config)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and self.settings.seq_len > longest:
            raise InputError(
                f"--seq-len {self.settings.seq_len} is more than the {longest} tokens that the model takes"
            )
        with readable(_CANNOT_QUANTIZE):
            plan(
                model,
                adapter_config(self.settings),
                self.settings.target_names(),
                skipped(model),
                target_parameters=self.settings.target_experts(),
                experts=not self._of_bitsandbytes,
            )

    def load(self) -> nn.Module:
        """A dense model with 16-bit weights, ready for activations of ``dtype``; or a 4-bit one with fresh adapters.

        Raises:
            InputError: for files that are missing, damaged or do not belong together, and for non-finite weights.
        """
        from transformers import AutoModelForCausalLM

        name = self.folder
        if self.four_bit:
            return self._load_quantized().eval()
        with readable(f"--model {name}"), quiet_transformers():
            # A tuple with output_loading_info, though annotated as a model.
            model, info = cast(Any, AutoModelForCausalLM).from_pretrained(
                name, output_loading_info=True, trust_remote_code=False, **dtype_argument(torch.bfloat16)
            )
        if info["missing_keys"]:
            missing = sorted(info["missing_keys"])
            raise InputError(f"--model {name} lacks {len(missing)} tensors of its architecture, first {missing[0]}")
        # In float32 the values stay those of the 16-bit weights; float16 has no room for the largest.
        model = cast_parameters(model, self.dtype)
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise InputError(
                    f"--model {name}: {key} holds NaN or infinity in {self.dtype}; only finite weights can be used"
                )
        if self.settings.is_tiny:
            speed_up(model)
        return model.to(self.settings.device).eval()

    def _load_quantized(self) -> nn.Module:
        from ..interop.transformers.load import load_quantized

        settings = self.settings
        with readable(f"--model {self.folder}"):
            return load_quantized(
                self.folder,
                rank=settings.rank,
                alpha=settings.alpha,
                dropout=settings.lora_dropout,
                rslora=settings.rslora,
                target_modules=settings.target_names(),
                adapter_dtype=torch.float32,
                dtype=self.dtype,
                device=settings.device,
                target_parameters=settings.target_experts(),
            )


_LARGEST_TEMPLATE = 1 << 20
_CANNOT_QUANTIZE = "cannot quantize the model"


def adapter_config(settings: Settings) -> AdapterConfig:
    """The configuration of every adapter of the run."""
    return AdapterConfig(settings.rank, settings.alpha, settings.lora_dropout, settings.rslora)


def quantize(model: nn.Module, settings: Settings) -> QuantizeReport:
    """Quantizes in place, unless the model is 4-bit. Adapters are float32, with the 16-bit baseline's initial values.

    Raises:
        InputError: for target modules that match nothing, a rank larger than a layer, non-finite weights.
    """
    already = any(True for _ in adapted_layers(model))
    report = _already_quantized(model) if already else _quantize(model, settings)
    layers = dict(adapted_layers(model))
    share_initial_values({name: layers[name] for name in (*report.adapted, *report.adapted_experts)}, settings.seed)
    return report


def _quantize(model: nn.Module, settings: Settings) -> QuantizeReport:
    with readable(_CANNOT_QUANTIZE):
        return quantize_model(
            model,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.lora_dropout,
            rslora=settings.rslora,
            target_modules=settings.target_names(),
            skip=skipped(model),
            double_quant=settings.double_quant,
            adapter_dtype=torch.float32,
            progress=False,
            target_parameters=settings.target_experts(),
        )


def _already_quantized(model: nn.Module) -> QuantizeReport:
    layers, stacks, size = dict(qlora_layers(model)), dict(experts_layers(model)), bytes_of(model)
    return QuantizeReport(
        quantized=list(layers),
        adapted=[name for name, layer in layers.items() if layer.active_adapter is not None],
        bytes_before=size,
        bytes_after=size,
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        total_parameters=count_parameters(model),
        experts=list(stacks),
        adapted_experts=[name for name, layer in stacks.items() if layer.active_adapter is not None],
    )


def digest(model: nn.Module) -> str:
    """A digest to recognise a base by: of names, shapes and a sample of the values, without adapters."""
    result = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if ".lora_A." in name or ".lora_B." in name:
            continue
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // 1024, 1)].contiguous().cpu()
        result.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
        result.update(sample.view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _refuse_quantized(model: str, quantization: Any) -> None:
    """
    Raises:
        InputError: for a dense model that is none. transformers would load it with layers of another package.
    """
    if not quantization:
        return
    values = quantization if isinstance(quantization, dict) else vars(quantization)
    method = values.get("quant_method")
    advice = "give the dense model, or a folder that 'qlora-kernels quantize' wrote from it"
    if method == METHOD or values.get("load_in_4bit") is True:
        advice = "give the folder that it was downloaded to"
    raise InputError(f"--model {model} is quantized already, by {str(method)!r:.60}; {advice}")


def _load_config(model: str):
    with readable(f"--model {model}"):
        return load_config(model)


def _load_tokenizer(model: str):
    from transformers import AutoTokenizer

    with readable(f"--model {model} has no usable tokenizer"):
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def _read_template(path: str) -> str:
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST_TEMPLATE + 1)
        if len(content) > _LARGEST_TEMPLATE:
            raise InputError(
                f"--chat-template {path} has more than {_LARGEST_TEMPLATE >> 20} MiB, which no template has"
            )
        template = content.decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--chat-template {path} cannot be read: {error.strerror or sentence(error)}") from None
    except ValueError as error:  # a folder or a pipe, or bytes that are not UTF-8
        raise InputError(f"--chat-template {path} cannot be used: {sentence(error)}") from None
    if not template.strip():
        raise InputError(f"--chat-template {path} is empty")
    return template


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
    """The quantization_config of a folder's config.json; empty for an id.

    Raises:
        InputError: when ``model`` looks like a path rather than an id but is not a folder, or holds no model.
    """
    if os.path.isdir(model):
        return read_config(model, "--model ").get("quantization_config") or {}
    if os.path.exists(model):
        raise InputError(f"--model {model} is a file; a Hugging Face folder or id was expected")
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise InputError(f"--model {model}: no such folder")
    return {}

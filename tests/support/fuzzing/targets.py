"""What is fuzzed: each parser, valid files for it, mutations of them, and what it may answer.

A target calls the public entry on a folder. It may return, or raise one of the exceptions that the entry's docstring
promises, with a message that names the file. What it must not do is raise :class:`Wrong`: that says that a failed call
changed something, or that a successful one returned something unusable.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_kernels import NF4Weight, PagedAdamW, PagedLion, QLinear, load_adapter, quantize, save_adapter
from qlora_kernels.errors import InputError
from qlora_kernels.finetune import checkpoint
from qlora_kernels.finetune.options import Options
from qlora_kernels.storage import safetensors_stream
from qlora_kernels.storage.digest import digest

from . import bitsandbytes_folders as b
from . import mutations as m
from . import texts
from . import torch_mutations as t
from .files import Files


class Wrong(Exception):
    """The call did something that no caller expects; ``what`` is the same for the same fault."""

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(f"{what} ({detail})" if detail else what)
        self.what = what


@dataclass(frozen=True)
class Target:
    """A parser.

    Attributes:
        name: for the command line and the corpus.
        about: what it calls.
        seeds: makes the valid cases.
        mutations: with their weights.
        call: the parser, on a folder with the case's files.
        refusals: the exceptions that its docstring promises.
        output: a name in the folder that it may write.
        names: what a message may say instead of a file's name, a regular expression.
    """

    name: str
    about: str
    seeds: Callable[[], list[Files]]
    mutations: Sequence[tuple[int, m.Mutation]]
    call: Callable[[Path], None]
    refusals: tuple[type[Exception], ...]
    output: str = ""
    names: str = "(?!)"


def _files_of(folder: str | Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """A folder and a seed of its own for torch."""
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield Path(folder)


def _check_finite(what: str, tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float()).all()):
        raise Wrong("loaded, with values that are not finite", what)


# ------------------------------------------------------------------------------------------------- safetensors stream


@functools.cache
def _stream_seeds() -> list[Files]:
    with _scratch() as folder:
        tensors = {name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in safetensors_stream.DTYPES.items()}
        tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
        for count, name in enumerate(("many", "one")):
            chosen = dict(list(tensors.items())[: 2 if count else None])
            entries = {key: safetensors_stream.Entry.like(value) for key, value in chosen.items()}
            with safetensors_stream.Writer(str(folder / name), entries) as writer:
                for key, value in chosen.items():
                    writer.write(key, value)
        return [{"x.safetensors": (folder / name).read_bytes()} for name in ("many", "one")]


def _read_stream(folder: Path) -> None:
    entries, metadata = safetensors_stream.read_header(str(folder / "x.safetensors"))
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise Wrong("returned metadata that are not strings")
    for name, entry in entries.items():
        tensor = safetensors_stream.read(entry)
        if safetensors_stream.Entry.like(tensor).nbytes != entry.nbytes or tuple(tensor.shape) != entry.shape:
            raise Wrong("announced and read differently", f"{name}: {entry}, {tensor.dtype} {list(tensor.shape)}")


# --------------------------------------------------------------------------------------------------------- NF4 weight


@functools.cache
def _nf4_seeds() -> list[Files]:
    with _scratch() as folder:
        weight = torch.randn(9, 31)
        quantize(weight).save(folder / "double")
        quantize(weight.bfloat16(), double_quant=False).save(folder / "single")
        return [{"weight.safetensors": content} for content in _files_of(folder).values() if isinstance(content, bytes)]


def _load_nf4(folder: Path) -> None:
    weight = NF4Weight.load(folder / "weight.safetensors")
    dense = weight.dequantize()
    if dense.shape != weight.shape or dense.dtype != weight.dtype:
        raise Wrong("decodes to another shape or type", f"{weight}, {list(dense.shape)} {dense.dtype}")
    _check_finite("a weight", weight.dequantize(torch.float64))


# ------------------------------------------------------------------------------------------------------------ adapters


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 12)


class _Small(nn.Module):
    """With names as long as real ones are: how long a regular expression takes may depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers_of_the_decoder = nn.ModuleList([nn.ModuleDict({"self_attention": _Block()}) for _ in range(2)])


@functools.cache
def _small_template() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Small()
        for block in [module for module in model.modules() if isinstance(module, _Block)]:
            for name, linear in list(block.named_children()):
                setattr(block, name, QLinear.from_linear(linear, 2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        return model


def _adapter_state(model: nn.Module) -> str:
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QLinear)}
    facts = {name: [repr(layer.adapters), layer.active_adapter] for name, layer in layers.items()}
    return digest([facts, dict(model.state_dict()), dict(model.named_parameters())])


@functools.cache
def _adapter_seeds() -> list[Files]:
    model = _small_template()
    with _scratch() as folder:
        save_adapter(model, folder / "own")
        own = _files_of(folder / "own")
    data = own["adapter_model.safetensors"]
    config = own["adapter_config.json"]
    assert isinstance(data, bytes)
    assert isinstance(config, bytes)
    # As PEFT writes it: no copy of the configuration; and with the settings that differ from layer to layer.
    header, body = m.split(data)
    plain = m.join({**header, "__metadata__": {"format": "pt"}}, body)
    fitted = json.loads(config) | {
        "target_modules": r".*\.\d+\.self_attention\.[qv]_proj",
        "r": 4,
        "rank_pattern": {r"0\.self_attention\.q_proj": 2, r"[qv]_proj": 2},
        "alpha_pattern": {"v_proj": 3.5},
        "lora_dropout": 0.1,
        "use_rslora": True,
    }
    foreign = {"adapter_config.json": m.dump(fitted), "adapter_model.safetensors": plain}
    return [own, {"adapter_config.json": config, "adapter_model.safetensors": plain}, foreign]


_ADAPTER_KEYS = (
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "peft_type"),
    *("bias", "init_lora_weights", "use_dora", "lora_bias", "modules_to_save", "exclude_modules", "fan_in_fan_out"),
    *("layers_to_transform", "layers_pattern", "layer_replication", "target_parameters", "trainable_token_indices"),
    *("eva_config", "loftq_config", "use_qalora", "task_type", "base_model_name_or_path", "auto_mapping", "revision"),
)


#: Regular expressions that take exponential or polynomial time for a long name, or that are unusual.
_PATTERNS = (
    *(
        "(.|.)*!",
        "(.*)*!",
        r"(\w+\.?)*!",
        "([a-z]+)+!",
        "(.+.+)+!",
        "(?:[a-z0-9_.]|[a-z0-9_.])+!",
        ".*.*.*.*.*.*.*.*.*.*!",
    ),
    *(
        r"(?:(?:\w+)*\.)*!",
        "(a?){60}a{60}",
        "(.*?,){11}P",
        "(?i)q_proj",
        "(?x) q_proj # )",
        "q_proj)|(?:x",
        "(",
        "",
        "$",
        "|",
    ),
    *(
        r"\1",
        "(?P<a>q)(?P<a>v)",
        "(?=.*q)",
        "(?#",
        "x{1,4294967296}",
        "[[:alpha:]]",
        "q_proj\n",
        "\0",
        ".",
        "(?a)x",
        "\ud800",
    ),
    *("(" * 150 + ")" * 150, "(" * 3000 + ")" * 3000, "x" * 70_000, "|".join("ab" * 500)),
)


def _adapter_patterns(files: Files, rng: random.Random) -> str:
    """An expression that a reader has to run on every layer's name."""
    try:
        config = json.loads(files["adapter_config.json"])  # type: ignore[arg-type]
        key, pattern = rng.choice(("target_modules", "rank_pattern", "alpha_pattern")), rng.choice(_PATTERNS)
        config[key] = pattern if key == "target_modules" else {pattern: 2, **(config.get(key) or {})}
    except (KeyError, ValueError, TypeError, RecursionError):
        return ""
    files["adapter_config.json"] = m.dump(config)
    return f"adapter_config.json: {key} has {pattern[:60]!r}"


def _adapter_settings(files: Files, rng: random.Random) -> str:
    """A sound setting that may not fit the weights."""
    choices = {
        "r": (1, 2, 3, 4, 8, 9),
        "lora_alpha": (1, 2.5, 16, 1e-30, 1e30),
        "lora_dropout": (0, 0.5, 0.999, 1),
        "use_rslora": (True, False),
        "target_modules": (["q_proj"], ["v_proj", "q_proj"], "q_proj", ".*", "all-linear", None),
        "rank_pattern": ({"q_proj": 3}, {".*": 2}, {"v_proj": 2, "q_proj": 2}),
        "alpha_pattern": ({"q_proj": 3}, {".*": 2.5}, {"x": 1}),
    }
    try:
        config = json.loads(files["adapter_config.json"])  # type: ignore[arg-type]
        key = rng.choice(list(choices))
        config[key] = rng.choice(choices[key])
    except (KeyError, ValueError, TypeError, RecursionError):
        return ""
    files["adapter_config.json"] = m.dump(config)
    return f"adapter_config.json: {key} is {config[key]!r}"


def _skip_patterns(files: Files, rng: random.Random) -> str:
    """The same in a 4-bit folder: the layers to leave alone."""
    try:
        config = json.loads(files["config.json"])  # type: ignore[arg-type]
        pattern = rng.choice(_PATTERNS)
        config["quantization_config"]["modules_to_not_convert"] = rng.choice((pattern, [pattern], ["lm_head", pattern]))
    except (KeyError, ValueError, TypeError, RecursionError):
        return ""
    files["config.json"] = m.dump(config)
    return f"config.json: modules_to_not_convert has {pattern[:60]!r}"


def _load_adapter(folder: Path) -> None:
    model = copy.deepcopy(_small_template())
    before = _adapter_state(model)
    try:
        load_adapter(model, folder)
    except Exception:
        if _adapter_state(model) != before:
            raise Wrong("a failed load has changed the model") from None
        raise
    for name, layer in model.named_modules():
        if not isinstance(layer, QLinear):
            continue
        for settings in layer.adapters.values():
            _check_finite(f"the scaling of {name}", torch.tensor(float(settings.scaling), dtype=torch.float32))
        for matrix in (*layer.lora_A.values(), *layer.lora_B.values()):
            _check_finite(f"an adapter of {name}", matrix)
        layer.eval()(torch.ones(2, layer.in_features))


# ------------------------------------------------------------------------------------------------------ model folders


@functools.cache
def _dense_folder() -> Files:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    with _scratch() as folder, contextlib.redirect_stderr(io.StringIO()):  # it shows a bar
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
        return _files_of(folder)


#: A module that a configuration may name in ``auto_map``. It must never run.
_MODULE = b"import os\nopen('ran', 'w').close()\nos.system('touch ran')\nclass X: pass\n"


@functools.cache
def _dense_seeds() -> list[Files]:
    dense = _dense_folder() | {"modeling_x.py": _MODULE}
    data = dense["model.safetensors"]
    assert isinstance(data, bytes)
    names = [name for name in m.split(data)[0] if name != "__metadata__"]
    index = {"metadata": {}, "weight_map": {name: "model.safetensors" for name in names}}
    return [dense, dense | {"model.safetensors.index.json": m.dump(index)}]


@functools.cache
def _four_bit_seeds() -> list[Files]:
    from qlora_kernels.interop.transformers.quantize_folder import quantize_folder

    cases = []
    with _scratch() as folder:
        for number, options in enumerate(({}, {"double_quant": False}, {"max_shard_size": 4000})):
            source, out = folder / f"dense{number}", folder / f"out{number}"
            source.mkdir()
            for name, content in _dense_folder().items():
                assert isinstance(content, bytes)
                (source / name).write_bytes(content)
            quantize_folder(source, out, progress=False, **options)
            cases.append(_files_of(out) | {"modeling_x.py": _MODULE})
    return cases


@functools.cache
def _bitsandbytes_seeds() -> list[Files]:
    with _scratch():
        return [case | {"modeling_x.py": _MODULE} for case in b.seeds(_dense_folder())]


_CONFIG_KEYS = (
    *("quantization_config", "model_type", "architectures", "dtype", "torch_dtype", "hidden_size", "num_hidden_layers"),
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_scaling"),
    *(
        "rope_parameters",
        "rope_theta",
        "tie_word_embeddings",
        "hidden_act",
        "pad_token_id",
        "auto_map",
        "attn_implementation",
    ),
    *(
        "_attn_implementation",
        "num_labels",
        "id2label",
        "trust_remote_code",
        "is_encoder_decoder",
        "use_bfloat16",
        "pruned_heads",
    ),
    *(
        "quant_method",
        "double_quant",
        "modules_to_not_convert",
        "block_size",
        "max_position_embeddings",
        "_name_or_path",
    ),
    *(
        "attention_bias",
        "mlp_bias",
        "rms_norm_eps",
        "initializer_range",
        "layer_types",
        "attribute_map",
        "transformers_version",
    ),
)


def _auto_map(files: Files, rng: random.Random) -> str:
    """A configuration that asks for code in the folder, or elsewhere, to be run."""
    try:
        config = json.loads(files["config.json"])  # type: ignore[arg-type]
        where = rng.choice(
            ("modeling_x.X", "modeling_x", "someone/else--modeling_x.X", "../modeling_x.X", 5, ["modeling_x.X"])
        )
        config["auto_map"] = {name: where for name in ("AutoConfig", "AutoModelForCausalLM", "AutoModel")}
        if rng.random() < 0.7:
            config["model_type"] = rng.choice(("x", "nothing_known", "llama_x", None))
    except (KeyError, ValueError, TypeError, RecursionError):
        return ""
    files["config.json"] = m.dump(config)
    return f"config.json: auto_map {where!r}, model_type {config.get('model_type')!r}"


def _load_four_bit(folder: Path) -> None:
    from qlora_kernels.interop.transformers.load import load_quantized

    model = load_quantized(folder, rank=2)
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise Wrong("loaded, with tensors on the meta device", name)
        _check_finite(name, tensor)
    # What the configuration makes of the model may fail; the process may not.
    with contextlib.suppress(Exception), torch.no_grad():
        model(torch.zeros(1, 3, dtype=torch.int64))


def _quantize_folder(folder: Path) -> None:
    from qlora_kernels.interop.transformers.quantize_folder import quantize_folder

    out = folder / "out" / "model"
    try:
        quantize_folder(folder, out, progress=False)
    except Exception:
        if out.exists() or (out.parent.exists() and os.listdir(out.parent)):
            raise Wrong("a failed quantize_folder left a folder") from None
        raise
    for path in out.iterdir():
        if path.suffix == ".safetensors":
            for entry in safetensors_stream.read_header(str(path))[0].values():
                safetensors_stream.read(entry)


# ----------------------------------------------------------------------------------------------------------- optimizers


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 40)
        self.scale = nn.Parameter(torch.tensor(1.5))


_OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "PagedAdamW-32": functools.partial(PagedAdamW, lr=1e-2),
    "PagedAdamW-8": functools.partial(PagedAdamW, lr=1e-2, state_bits=8),
    "PagedLion-32": functools.partial(PagedLion, lr=1e-3),
    "PagedLion-8": functools.partial(PagedLion, lr=1e-3, state_bits=8),
}


def _optimizer(kind: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    net = _Net()
    optimizer = _OPTIMIZERS[kind](
        [{"params": list(net.linear.parameters())}, {"params": [net.scale], "weight_decay": 0.0}]
    )
    _step(net, optimizer)
    return net, optimizer


def _step(net: nn.Module, optimizer: Any) -> None:
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1))
    optimizer.step()


@functools.cache
def _optimizer_seeds() -> list[Files]:
    cases = []
    with _scratch() as folder:
        for kind in _OPTIMIZERS:
            net, optimizer = _optimizer(kind)
            _step(net, optimizer)
            optimizer.save(folder / kind)
            cases.append({"optimizer.pt": _saved_again(folder / kind), "kind": kind.encode()})
    return cases


def _saved_again(path: Path) -> bytes:
    """A file of torch with the same contents, and without the name of the temporary file that it was written as."""
    buffer = io.BytesIO()
    torch.save(torch.load(path, weights_only=True), buffer)
    return buffer.getvalue()


def _has_digest(value: Any) -> bool:
    """Whether a digest can be computed in no time."""
    try:
        tensors = [inner for c, k in m.places(value) if isinstance(inner := c[k], torch.Tensor)]
    except ValueError:
        return False
    return sum(tensor.numel() for tensor in tensors) < 1 << 20


def _signed(unsigned: tuple[str, ...]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Puts the digest of everything but the keys ``unsigned`` into a file's value, where it can be computed."""

    def sign(value: dict[str, Any]) -> dict[str, Any]:
        content = {key: inner for key, inner in value.items() if key not in (*unsigned, "sha256")}
        head = {key: value[key] for key in unsigned if key in value}
        found = "0" * 64
        if _has_digest(content):
            with contextlib.suppress(Exception):
                found = digest(content)
        return {**head, "sha256": found, **content}

    return sign


def _load_optimizer(folder: Path) -> None:
    net, optimizer = _optimizer((folder / "kind").read_text())
    before = digest(optimizer.state_dict())
    try:
        optimizer.load(folder / "optimizer.pt")
    except Exception:
        try:
            same = digest(optimizer.state_dict()) == before
            _step(net, optimizer)
        except Exception as error:
            raise Wrong("a failed load has left the optimizer unusable", f"{type(error).__name__}: {error}") from None
        if not same:
            raise Wrong("a failed load has changed the optimizer") from None
        raise
    try:
        _step(net, optimizer)
        optimizer.state_dict()
    except Exception as error:
        raise Wrong("loaded, and unusable", f"{type(error).__name__}: {error}") from None


# ---------------------------------------------------------------------------------------------------------- checkpoints


def _settings() -> Any:
    return Options(tiny_hidden=64, tiny_layers=1, optim="paged_adamw", steps=4).resolve()


@functools.cache
def _checkpoint_seeds() -> list[Files]:
    cases = []
    with _scratch() as folder:
        net, optimizer = _optimizer("PagedAdamW-32")
        common = {"options": _settings().decisive(), "identity": {"data": "0" * 64, "base model": "1" * 64}}
        running = checkpoint.Checkpoint(
            **common,
            phase="qlora",
            step=1,
            total=4,
            losses=[2.5],
            tensors={name: p.detach().clone() for name, p in net.named_parameters()},
            optimizer=optimizer.state_dict(),
            rng=checkpoint.rng_state("cpu"),
            seconds=0.5,
            results={"base16": {"loss": 2.0, "seconds": 0.1, "peak": 100}},
        )
        between = checkpoint.Checkpoint(
            **common, phase="between", step=0, total=0, losses=[], tensors={}, optimizer={}, rng={}, seconds=0.0
        )
        for case in (running, between):
            checkpoint.save(case, str(folder))
            cases.append({"checkpoint.pt": _saved_again(folder / "checkpoint.pt")})
    return cases


def _resume(folder: Path) -> None:
    """What ``finetune --resume`` does with the file, up to the first step."""
    saved = checkpoint.load(str(folder))
    checkpoint.check_same_run(saved, _settings(), {"data": "0" * 64, "base model": "1" * 64})
    if saved.phase != "qlora":
        return
    net, optimizer = _optimizer("PagedAdamW-32")
    checkpoint.restore_tensors(saved, dict(net.named_parameters()))
    try:
        optimizer.load_state_dict(saved.optimizer)
    except ValueError:  # whoever made the digest right can put another model's states there; the trainer reports it
        return
    checkpoint.restore_rng(saved.rng, "cpu")


# ---------------------------------------------------------------------------------------------------------------- all

_OPTIMIZER_KEYS = (
    *(
        "state",
        "param_groups",
        "format",
        "optimizer",
        "params",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "step",
        "exp_avg",
    ),
    *("exp_avg_sq", "exp_avg_code", "exp_avg_absmax", "exp_avg_sq_code", "exp_avg_sq_absmax", "master", "amsgrad"),
    *("maximize", "fused", "initial_lr", "foreach", "capturable"),
)
_CHECKPOINT_KEYS = tuple(f.name for f in fields(checkpoint.Checkpoint))
_FOLDER_FILES = ("config.json", "model.safetensors", "model.safetensors.index.json")

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "safetensors",
            "storage.safetensors_stream: read_header and read",
            _stream_seeds,
            [
                (3, m.raw("x.safetensors")),
                (6, m.safetensors_header("x.safetensors")),
                (4, m.safetensors_tensors("x.safetensors")),
                (2, m.safetensors_metadata("x.safetensors", ("format",))),
                (1, m.no_plain_file("x.safetensors")),
            ],
            _read_stream,
            (OSError, ValueError),
        ),
        Target(
            "nf4",
            "NF4Weight.load",
            _nf4_seeds,
            [
                (2, m.raw("weight.safetensors")),
                (3, m.safetensors_header("weight.safetensors")),
                (8, m.safetensors_tensors("weight.safetensors")),
                (3, m.safetensors_metadata("weight.safetensors", ("format", "dtype"))),
                (1, m.no_plain_file("weight.safetensors")),
            ],
            _load_nf4,
            (OSError, ValueError),
        ),
        Target(
            "adapter",
            "load_adapter, with adapter_config.json and its copy in the weights",
            _adapter_seeds,
            [
                (12, m.json_file("adapter_config.json", _ADAPTER_KEYS)),
                (4, _adapter_patterns),
                (4, _adapter_settings),
                (1, m.raw("adapter_config.json", "adapter_model.safetensors")),
                (2, m.safetensors_header("adapter_model.safetensors")),
                (5, m.safetensors_tensors("adapter_model.safetensors")),
                (
                    4,
                    m.safetensors_metadata(
                        "adapter_model.safetensors",
                        ("format", "qlora_kernels.adapter_config"),
                        "qlora_kernels.adapter_config",
                        _ADAPTER_KEYS,
                    ),
                ),
                (1, m.no_plain_file("adapter_config.json", "adapter_model.safetensors")),
            ],
            _load_adapter,
            (OSError, ValueError),
        ),
        Target(
            "four_bit",
            "load_quantized, on a folder of 'qlora-kernels quantize'",
            _four_bit_seeds,
            [
                (8, m.json_file("config.json", _CONFIG_KEYS)),
                (2, m.json_file("model.safetensors.index.json", ("weight_map", "metadata"))),
                (2, m.raw("config.json", "*.safetensors")),
                (2, m.safetensors_header("*.safetensors")),
                (8, m.safetensors_tensors("*.safetensors")),
                (2, _auto_map),
                (2, _skip_patterns),
                (1, m.no_plain_file("config.json", "model.safetensors", "model.safetensors.index.json")),
            ],
            _load_four_bit,
            (InputError, ValueError),
            names=r"\b(model\.|lm_head|quantization_config|modules_to_not_convert)",
        ),
        Target(
            "bitsandbytes",
            "load_quantized, on a folder of bitsandbytes' weights",
            _bitsandbytes_seeds,
            [
                (10, b.quant_state),
                (4, m.json_file("config.json", (*b.CONFIG_KEYS, *_CONFIG_KEYS))),
                (2, m.raw("config.json", "*.safetensors")),
                (2, m.safetensors_header("*.safetensors")),
                (8, m.safetensors_tensors("*.safetensors")),
                (1, m.no_plain_file("config.json", "model.safetensors")),
            ],
            _load_four_bit,
            (InputError, ValueError),
            names=r"\b(model\.|lm_head|quantization_config|llm_int8_skip_modules)",
        ),
        Target(
            "dense",
            "quantize_folder, on a model's folder",
            _dense_seeds,
            [
                (8, m.json_file("config.json", _CONFIG_KEYS)),
                (4, m.json_file("model.safetensors.index.json", ("weight_map", "metadata"))),
                (2, m.raw(*_FOLDER_FILES)),
                (2, m.safetensors_header("*.safetensors")),
                (4, m.safetensors_tensors("*.safetensors")),
                (2, _auto_map),
                (2, m.no_plain_file(*_FOLDER_FILES, "generation_config.json", "tokenizer.json")),
            ],
            _quantize_folder,
            (InputError,),
            output="out",
            names=r"\b(model\.|lm_head|quantization_config|modules_to_not_convert)",
        ),
        Target(
            "optimizer",
            "load of PagedAdamW and PagedLion, with 32 and 8 bits",
            _optimizer_seeds,
            [
                (12, t.torch_value("optimizer.pt", _signed(("format", "optimizer")), _OPTIMIZER_KEYS)),
                (6, t.torch_archive("optimizer.pt")),
                (1, t.bare_pickle("optimizer.pt")),
                (2, m.raw("optimizer.pt")),
                (1, m.no_plain_file("optimizer.pt")),
            ],
            _load_optimizer,
            (OSError, ValueError),
            names="",  # the caller has just named it; messages say which state or setting
        ),
        Target(
            "checkpoint",
            "finetune --resume: the checkpoint, its settings, tensors and generators",
            _checkpoint_seeds,
            [
                (12, t.torch_value("checkpoint.pt", _signed(("format",)), _CHECKPOINT_KEYS)),
                (6, t.torch_archive("checkpoint.pt")),
                (1, t.bare_pickle("checkpoint.pt")),
                (2, m.raw("checkpoint.pt")),
                (1, m.no_plain_file("checkpoint.pt")),
            ],
            _resume,
            (InputError,),
            names="--resume",
        ),
        Target(
            "pairs",
            "finetune --data: lines with prompt and completion",
            texts.pair_seeds,
            [
                (4, m.json_file("pairs.jsonl", ("prompt", "completion"))),
                (4, m.raw("pairs.jsonl")),
                (1, m.no_plain_file("pairs.jsonl")),
            ],
            texts.read_pairs,
            (InputError,),
        ),
        Target(
            "messages",
            "finetune --data: lines with messages, and their tokens",
            texts.message_seeds,
            [
                (8, m.json_file("messages.jsonl", texts.MESSAGE_KEYS)),
                (3, m.raw("messages.jsonl")),
                (1, m.no_plain_file("messages.jsonl")),
            ],
            texts.read_messages,
            (InputError,),
        ),
    )
}

"""What is trained beside an adapter's matrices: heads, embeddings, norms and biases, as PEFT's files hold them.

PEFT names whole modules (``modules_to_save``) and biases (``bias``). A module's tensors are stored under
``base_model.model.<name>``; the bias of an adapted layer under ``base_model.model.<layer>.base_layer.bias``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import listed
from ..layers.packed import PackedLayer, is_sharded
from ..ops import dispatcher
from ..storage.safetensors_stream import DTYPES, Entry, Reader
from . import sharded
from .peft_config import WRAPPERS

PREFIX = "base_model.model."
_BASE_LAYER = ".base_layer."
_WRAPPED = re.compile(r"\.(base_layer\.)+")  # more than one around a module of experts
_TOKENS = "token_adapter.trainable_tokens_delta"


class Dense:
    """The dense tensors of a quantized model, under the names that they have without wrappers.

    Attributes:
        modules: all modules that are not inside a 4-bit layer; one in several places has several names.
        tensors: their parameters and persistent buffers; of a 4-bit layer its bias alone.
        packed: names of the 4-bit layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.tensors: dict[str, Tensor] = {}
        self.packed: list[str] = []
        self._owners: dict[str, tuple[nn.Module, str]] = {}
        for name, module in _outside_packed(model, ""):
            name = WRAPPERS.sub("", f"{name}.").rstrip(".")
            self.modules[name] = module
            own = dict(module._parameters) | {
                key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set
            }
            if isinstance(module, PackedLayer):
                self.packed.append(name)
                own = {"bias": module.bias}
            for key, tensor in own.items():
                if tensor is not None:
                    full = f"{name}.{key}" if name else key
                    self.tensors[full] = tensor
                    self._owners[full] = module, key

    def inside(self, module: str) -> list[str]:
        """The tensors in a module."""
        return [name for name in self.tensors if name.startswith(f"{module}.")]

    def same(self, name: str) -> list[str]:
        """All names of one tensor, this one among them. Tensors over the same memory count as one."""
        own = _identity(self.tensors[name])
        return [other for other, tensor in self.tensors.items() if _identity(tensor) == own]

    def holds_packed(self, module: str) -> bool:
        return any(name == module or name.startswith(f"{module}.") for name in self.packed)

    def replace(self, name: str, parameter: nn.Parameter) -> None:
        module, key = self._owners[name]
        module._parameters[key] = parameter


def _outside_packed(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if not isinstance(module, PackedLayer):
        for key, child in module._modules.items():
            if child is not None:
                yield from _outside_packed(child, f"{name}.{key}" if name else key)


def _identity(tensor: Tensor) -> Any:
    if is_sharded(tensor) or tensor.is_meta or not tensor.numel():
        return id(tensor)
    return str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


# ------------------------------------------------------------------------------------------------------- writing


@dataclass
class Trained:
    """What to save beside an adapter's matrices.

    Attributes:
        modules: names of whole modules, as modules_to_save in PEFT's configuration has them, or None.
        bias: PEFT's setting: "none", "lora_only" (of adapted layers) or "all".
        tensors: by the key in the file.
    """

    modules: list[str] | None = None
    bias: str = "none"
    tensors: dict[str, Tensor] = field(default_factory=dict)


def find_trained(model: nn.Module, adapted: Collection[str]) -> Trained:
    """The dense tensors of a model that ask for gradients, and those that have to go with them.

    PEFT copies a module that it saves, so all modules that share a trained tensor are saved.

    Args:
        model: without wrappers.
        adapted: the layers that have the adapter.

    Raises:
        ValueError: where a module's name is also the end of another's that cannot be saved: PEFT would take both.
    """
    dense = Dense(model)
    trained = [name for name, tensor in dense.tensors.items() if tensor.requires_grad]
    modules: set[str] = set()
    biases: set[str] = set()
    loose: set[str] = set()  # PEFT reads them, though its configuration cannot name them
    while trained:
        found = set(trained) - biases - loose
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in found):
            names = {name for name in found if name.rpartition(".")[0] == owner}
            own = [key for key, value in dense.modules[owner]._parameters.items() if value is not None]
            bias_alone = names == {f"{owner}.bias"} and own != ["bias"]
            if bias_alone or isinstance(dense.modules[owner], PackedLayer):
                biases |= names
            elif not owner or dense.holds_packed(owner):
                loose |= names
            else:
                modules.add(owner)
        modules |= _also_meant(dense, modules)
        saved = biases | loose | {name for module in modules for name in dense.inside(module)}
        trained = [twin for name in saved for twin in dense.same(name) if twin not in saved]
    modules = {name for name in modules if not any(name.startswith(f"{other}.") for other in modules)}
    saved = {name: name for module in modules for name in dense.inside(module)}
    biases -= saved.keys()
    for name in biases:
        layer = name.removesuffix(".bias")
        saved[name] = f"{layer}{_BASE_LAYER}bias" if layer in adapted else name
    saved |= {name: name for name in loose}
    bias = "none"
    if biases:
        bias = "lora_only" if all(name.removesuffix(".bias") in adapted for name in biases) else "all"
    tensors = {f"{PREFIX}{saved[name]}": tensor for name, tensor in dense.tensors.items() if name in saved}
    return Trained(_shortest(dense, modules), bias, tensors)


def _also_meant(dense: Dense, modules: Collection[str]) -> set[str]:
    """PEFT takes every module whose name ends with the one it looks for, in the middle of a word, too."""
    ends = tuple(modules)
    also = {name for name in dense.modules if ends and name.endswith(ends)} - set(modules)
    for name in also:
        if dense.holds_packed(name):
            end = next(other for other in modules if name.endswith(other))
            raise ValueError(
                f"{end} is trained, but PEFT's format cannot name it without {name}, which holds 4-bit weights; call "
                f"requires_grad_(False) on {end} to save the adapter without it, or quantize the model with {name} "
                "in skip"
            )
    return also


def _shortest(dense: Dense, modules: Collection[str]) -> list[str] | None:
    """The last component of a name, where it means no module but these, or the whole name."""
    short = set()
    for name in modules:
        last = name.rpartition(".")[2]
        short.add(last if all(other in modules for other in dense.modules if other.endswith(last)) else name)
    return sorted(short) or None


# ------------------------------------------------------------------------------------------------------- reading


class Values:
    """Values for dense tensors of a model, checked and with their dtype and device; :meth:`put` cannot fail."""

    def __init__(self, dense: Dense) -> None:
        self._dense = dense
        self._values: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    @property
    def names(self) -> list[str]:
        return list(self._values)

    def put(self) -> None:
        """Gives the model its values; parameters ask for gradients then, so that they are saved again."""
        dense, done = self._dense, set()
        for name, value in self._values.items():
            if name in done:
                continue
            own, twins = dense.tensors[name], dense.same(name)
            if all(twin in self._values and torch.equal(self._values[twin], value) for twin in twins):
                sharded.fill(own, value)
                for twin in twins:
                    if value.is_floating_point() and isinstance(dense.tensors[twin], nn.Parameter):
                        dense.tensors[twin].requires_grad_(True)
                done |= set(twins)
            else:  # PEFT gives a module that it saves a copy of its own
                dense.replace(name, nn.Parameter(value))

    def check_ties(self, where: str) -> None:
        """
        Raises:
            ValueError: where a shared tensor would need different values, but cannot be split.
        """
        for name, value in self._values.items():
            own, twins = self._dense.tensors[name], self._dense.same(name)
            if all(twin in self._values and torch.equal(self._values[twin], value) for twin in twins):
                continue
            if is_sharded(own) or not isinstance(own, nn.Parameter):
                others = listed([twin for twin in twins if twin != name], 3)
                raise ValueError(f"{where}: {name} differs from {others}, but they are one tensor in this model")


def read_values(
    file: Reader, entries: Mapping[str, Entry], model: nn.Module, config: Mapping[str, Any], where: str
) -> Values:
    """The values of a file that are not an adapter's matrices.

    Args:
        file: the open file.
        entries: those of its tensors that are not matrices.
        model: without wrappers.
        config: PEFT's configuration, checked.
        where: the file's name, for errors.

    Raises:
        ValueError: for one that the model has no dense tensor for, that does not fit, or is not finite; and where the
            configuration names a module that the file lacks.
    """
    dense = Dense(model)
    values = Values(dense)
    for key, entry in entries.items():
        name = _WRAPPED.sub(".", key.removeprefix(PREFIX))
        if name.endswith(f".{_TOKENS}"):
            _put_tokens(values, name.removesuffix(f".{_TOKENS}"), file.read(entry), config, key, where)
            continue
        own = _expected(dense, key, name, where)
        if entry.shape != tuple(own.shape):
            raise ValueError(f"{where}: {key} should be {list(own.shape)}, found {list(entry.shape)}")
        if DTYPES.get(entry.dtype) is None or DTYPES[entry.dtype].is_floating_point != own.is_floating_point():
            raise ValueError(f"{where}: {key} should be {own.dtype}, found {entry.dtype}")
        values._values[name] = _fitting(file.read(entry), own, key, where)
    _check_complete(dense, config, values._values, where)
    values.check_ties(where)
    return values


def _expected(dense: Dense, key: str, name: str, where: str) -> Tensor:
    """The model's tensor for a key."""
    own = dense.tensors.get(name) if key.startswith(PREFIX) else None
    if own is None:
        layer = next((layer for layer in dense.packed if name.startswith(f"{layer}.")), None)
        if layer is not None and key.startswith(PREFIX) and "lora_" not in key:
            raise ValueError(
                f"{where}: {key} was trained, but {layer} is 4-bit or has no such tensor; for {name} quantize the "
                f"model with {layer!r} in skip"
            )
        raise ValueError(
            f"{where}: keys should be {PREFIX}<layer>.lora_A.weight and lora_B.weight, or name a dense tensor of the "
            f"model; found {key}"
        )
    if own.is_meta:
        raise ValueError(f"{where}: {name} of the model is on the meta device; give the model memory first")
    if own.is_inference():
        raise ValueError(f"{where}: {name} of the model was made in inference mode and cannot be changed")
    dispatcher.require_memory(name, None if is_sharded(own) else own)
    return own


def _fitting(stored: Tensor, own: Tensor, key: str, where: str) -> Tensor:
    """A value with the dtype and device of the model's own tensor."""
    if not own.is_floating_point():
        return stored.to(own.device, own.dtype, copy=True)
    stored = stored.float() if stored.element_size() == 1 else stored  # float8 can be converted, and nothing else
    value = stored.to(own.device, own.dtype, copy=True)
    if not torch.isfinite(stored).all():
        raise ValueError(f"{where}: {key} holds NaN or infinity")
    if not torch.isfinite(value).all():
        raise ValueError(f"{where}: {key} holds values too large for the model's {own.dtype}")
    return value


def _put_tokens(values: Values, embedding: str, rows: Tensor, config: Mapping[str, Any], key: str, where: str) -> None:
    """Rows of an embedding that were trained, PEFT's trainable_token_indices; what is tied to it goes along."""
    dense, name = values._dense, f"{embedding}.weight"
    own = _expected(dense, key, name, where)
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((indices for end, indices in given.items() if embedding.endswith(end)), None)
    given = given if isinstance(given, list) else []
    if list(rows.shape) != [len(given), *own.shape[1:]] or not given or not rows.is_floating_point():
        raise ValueError(f"{where}: {key} is {list(rows.shape)}, which trainable_token_indices = {given} do not fit")
    if not (min(given) >= 0 and max(given) < own.shape[0] and len(set(given)) == len(given)):
        raise ValueError(f"{where}: trainable_token_indices should be different rows of {name}, found {given!r:.100}")
    value = sharded.whole(own).clone()
    value[torch.tensor(given, device=value.device)] = _fitting(rows, own, key, where)
    for twin in dense.same(name):
        values._values[twin] = value


def _check_complete(dense: Dense, config: Mapping[str, Any], values: Mapping[str, Tensor], where: str) -> None:
    for end in config.get("modules_to_save") or ():
        for module in dense.modules:
            if not module.endswith(end):
                continue
            if dense.holds_packed(module):
                raise ValueError(
                    f"{where}: modules_to_save names {module}, which is 4-bit or holds 4-bit layers in this model; "
                    f"quantize the model with {module!r} in skip"
                )
            missing = [name for name in dense.inside(module) if name not in values]
            if missing:
                raise ValueError(f"{where}: modules_to_save names {module}, but the file lacks {listed(missing, 3)}")

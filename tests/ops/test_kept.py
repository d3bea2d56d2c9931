"""Memory kept for the next large result: used again only when no tensor is left that uses it."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from qlora_kernels import quantize
from qlora_kernels.ops.backends import kept

SHAPE = (1024, 2048)


@pytest.fixture(autouse=True)
def nothing_kept():
    kept.release()
    yield
    kept.release()


def new() -> torch.Tensor:
    return kept.empty(SHAPE, torch.float32)


def test_memory_is_used_again_when_the_tensor_is_gone():
    first = new()
    address = first.data_ptr()
    assert new().data_ptr() != address
    del first
    assert new().data_ptr() == address
    # Another size gets memory of its own.
    assert kept.empty((2048, 2048), torch.float32).data_ptr() != address
    assert kept.empty(SHAPE, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("keep", ["a view", "an array", "a graph", "a storage", "dlpack"])
def test_memory_that_something_uses_is_left_alone(keep):
    tensor = new()
    address = tensor.data_ptr()
    x = torch.ones(SHAPE, requires_grad=True)
    user = {
        "a view": lambda t: t[3:5].t(),
        "an array": lambda t: t.numpy(),
        "a graph": lambda t: x * t,
        "a storage": lambda t: t.untyped_storage(),
        "dlpack": torch.utils.dlpack.to_dlpack,
    }[keep](tensor)
    del tensor
    assert new().data_ptr() != address
    del user
    assert new().data_ptr() == address


def test_memory_shared_with_other_processes_is_not_used_again():
    tensor = new().fill_(3)
    tensor.share_memory_()
    address = tensor.data_ptr()
    del tensor
    assert new().data_ptr() != address
    assert not any(storage.is_shared() for storage in kept._storages)


def test_a_storage_that_was_resized_is_forgotten():
    tensor = new()
    tensor.untyped_storage().resize_(0)
    del tensor
    assert new().untyped_storage().nbytes() == 4 * SHAPE[0] * SHAPE[1]


def test_the_limit(monkeypatch):
    monkeypatch.setenv(kept.VARIABLE, "20")
    tensors = [new() for _ in range(4)]
    assert sum(storage.nbytes() for storage in kept._storages) <= 20 << 20
    assert len({tensor.data_ptr() for tensor in tensors}) == 4
    monkeypatch.setenv(kept.VARIABLE, "0")
    new()
    assert not kept._storages
    # What is no number is the default.
    monkeypatch.setenv(kept.VARIABLE, "much")
    assert kept._limit() == kept.DEFAULT_MB << 20


def test_a_child_that_is_forked_while_the_lock_is_held():
    with kept._lock:
        child = os.fork()
        if child == 0:
            new()
            os._exit(7)
    end = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 7
    assert ended != (0, 0), "the child waits for the lock"


def test_whoever_comes_while_the_lock_is_held_goes_without():
    """A signal handler, or a finalizer that the garbage collector runs."""
    with kept._lock:
        assert new().shape == SHAPE
    assert not kept._storages


def test_without_torchs_count_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(kept, "_use_count", None)
    new()
    assert not kept._storages


def test_dequantize_takes_it_and_results_stay_apart():
    weight, other = quantize(torch.randn(*SHAPE)), quantize(torch.randn(*SHAPE))
    first = weight.dequantize(torch.float32)
    copy = first.clone()
    other.dequantize(torch.float32)
    again = other.dequantize(torch.float32)
    assert torch.equal(first, copy)
    assert not torch.equal(first, again)
    with torch.inference_mode():
        assert weight.dequantize(torch.float32).is_inference()
    first.requires_grad_().sum().backward()
    assert first.grad is not None

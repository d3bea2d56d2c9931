"""Other 4-bit formats: what their stored weights stand for is what their products multiply by."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from qlora_kernels.bench.case import relative_error
from qlora_kernels.bench.contenders import ggml_weights, int4_weights

needs_ggml = pytest.mark.skipif(find_spec("ggml") is None, reason="ggml-python is not installed")
N, K = 64, 320


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1)).bfloat16()


def test_int4_decodes_to_what_it_multiplies_by(weight, x):
    packed, dense = int4_weights.quantized(weight)
    assert packed.nbytes == N * K // 2 + 4 * N * K // 64
    assert relative_error(packed.product(x), x.double() @ dense.T) < 3e-3
    assert 0.05 < relative_error(dense, weight.double()) < 0.12  # half a level of 15 between the extremes of 64
    one = torch.eye(K)[:7].bfloat16()
    assert torch.equal(packed.clone().product(one).double(), dense.T[:7].bfloat16().double())


def test_int4_keeps_a_group_of_one_value():
    dense = int4_weights.quantized(torch.full((N, 64), 0.375))[1]
    assert relative_error(dense, torch.full((N, 64), 0.375).double()) < 1e-3


def test_formats_refuse_rows_that_end_within_a_block(weight):
    with pytest.raises(ValueError, match="groups have 64 weights, and k is 96"):
        int4_weights.quantized(weight[:, :96])
    with pytest.raises(ValueError, match="Q4_0 has blocks of 32, and k is 48"):
        ggml_weights.quantized(weight[:, :48])


@needs_ggml
def test_q4_0_decodes_to_what_it_multiplies_by(weight, x):
    packed = ggml_weights.quantized(weight)
    dense = ggml_weights.decoded(packed, (N, K))
    other = ggml_weights.quantized(weight.flip(0))
    product = ggml_weights.Product([packed, other], (N, K), x.float(), threads=2)
    exact = x.double() @ dense.T
    for _ in range(2):
        assert 1e-4 < relative_error(product(0), exact) < 0.02  # rows of x are rounded to int8
        assert relative_error(product(1), exact.flip(1)) < 0.02
    assert 0.05 < relative_error(dense, weight.double()) < 0.12
    # A row of one number rounds to int8 without an error, and so shows the decoded weight itself.
    shown = ggml_weights.Product([packed], (N, K), torch.eye(K)[:7], threads=1)(0)
    assert relative_error(shown, dense.T[:7]) < 1e-3


@needs_ggml
def test_ggml_names_the_set_that_it_was_compiled_for():
    assert ggml_weights.compiled_for(ggml_weights.ggml()) in ("portable", "avx2", "avx512", "avx512_bf16")

"""Lists of CUDA architectures, the names of wheels, and the sentence for a card that a build doesn't serve."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from qlora_kernels.native import architectures, extension
from qlora_kernels.native.architectures import local_version, names, parse, unserved
from qlora_kernels.ops import backends
from qlora_kernels.ops.backends import choose


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("80", ("80",)),
        ("80;90a", ("80", "90a")),
        ("90a,80", ("80", "90a")),  # oldest first, whatever the order
        (" 80 ; 100f,\t120+ptx;", ("80", "100f", "120+PTX")),
        ("120;120+PTX;120", ("120+PTX",)),
        ("90;90a", ("90", "90a")),
        ("75;80;86;89;90a;100a;120+PTX", architectures.ALL),
    ],
)
def test_lists(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["sm_80", "8.0", "80a", "90f", "80+SASS", "hopper", "native;80", "80;all", "1000", "8", "90A"]
)
def test_an_invalid_list_is_one_sentence(text):
    with pytest.raises(
        ValueError, match=r"^QLORA_KERNELS_CUDA_ARCHS should be native, none, all or a list .* is not a CUDA"
    ):
        parse(text)


def test_an_empty_list_and_one_too_old_are_sentences():
    with pytest.raises(ValueError, match=r"is empty; unset it for native"):
        parse(" ; ")
    with pytest.raises(ValueError, match=r"names 70, and the kernels need architecture 75 or a later one"):
        parse("70;80")


def test_names_of_wheels():
    assert local_version("13.0", ["80", "90a"]) == "+cu130.sm80.sm90a"
    assert local_version("12.8", ["120+PTX"]) == "+cu128.sm120.compute120"
    assert local_version("12.8", []) == ""
    assert names(["75", "100f+PTX", "120+PTX"]) == ["sm_75", "sm_100f", "sm_120", "compute_100f", "compute_120"]


def test_names_of_wheels_are_versions():
    packaging = pytest.importorskip("packaging.version")
    for built in (["80"], ["80", "90a"], architectures.ALL):
        version = "0.1.0" + local_version("13.0", built)
        assert str(packaging.Version(version)) == version


# ------------------------------------------------------------------------------------------------------------ cards


@pytest.mark.parametrize(
    ("built", "card", "served"),
    [
        # Machine code: the same major version and at least its minor one.
        ("80", (8, 0), True),
        ("80", (8, 6), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("75", (8, 0), False),
        ("90", (9, 0), True),
        # Of this architecture alone.
        ("90a", (9, 0), True),
        ("100a", (10, 3), False),
        ("90a+PTX", (10, 0), False),
        # Of its family.
        ("100f", (10, 0), True),
        ("100f", (10, 3), True),
        ("103f", (10, 0), False),
        ("100f", (12, 0), False),
        ("100f+PTX", (12, 0), False),
        ("120f", (12, 1), True),
        # PTX: all later ones, those of another major version too, and systems on a chip.
        ("80+PTX", (9, 0), True),
        ("80+PTX", (12, 1), True),
        ("80+PTX", (7, 5), False),
        ("80+PTX", (8, 7), True),
        # Systems on a chip run no code built for cards, nor the other way round.
        ("86", (8, 7), False),
        ("87", (8, 7), True),
        ("87", (8, 9), False),
        ("100f", (10, 1), False),
        # Any of several.
        ("75;80;86;89;90a;100a;120+PTX", (8, 9), True),
        ("75;80;86;89;90a;100a;120+PTX", (10, 3), False),
        ("75;80;86;89;90a;100a;120+PTX", (12, 1), True),
        ("", (9, 0), False),
    ],
)
def test_which_cards_are_served(built, card, served):
    assert (unserved(built, *card, "card") is None) is served


def test_the_sentence_names_the_card_the_build_and_the_command():
    assert unserved("80;120+PTX", 9, 0, "NVIDIA H100") == (
        "NVIDIA H100 is of architecture sm_90, and this build of qlora_kernels has kernels for sm_80, sm_120, "
        "compute_120 alone; build it for this card, in the source folder and with nvcc installed: "
        "QLORA_KERNELS_CUDA_ARCHS='90a' pip install ."
    )
    assert "has no CUDA kernels; build it for this card" in unserved("", 8, 9, "card")
    # The compiler has no architecture for these that the kernels could be built for.
    assert unserved("80", 7, 0, "Tesla V100") == (
        "Tesla V100 is of architecture sm_70, and the kernels of qlora_kernels need sm_75 or a later one"
    )


@pytest.mark.parametrize(
    "card", [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)]
)
def test_the_command_that_is_named_helps(card):
    command = re.search(r"QLORA_KERNELS_CUDA_ARCHS='(.*)'", unserved("", *card, "card"))[1]
    assert unserved(";".join(parse(command)), *card, "card") is None


# --------------------------------------------------------------------------------------------------------- backends


@pytest.fixture
def h100(monkeypatch):
    """A card that torch seems to see, and a build for the architectures that the test names."""

    def built_for(built: str):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
        native = SimpleNamespace(build_info=lambda: {"cuda_archs": built}, cuda="the kernels")
        monkeypatch.setattr(choose, "native", lambda: native)
        backends.cuda.cache_clear()

    yield built_for
    backends.cuda.cache_clear()


@pytest.mark.parametrize(("built", "has"), [("80", "kernels for sm_80 alone"), ("", "no CUDA kernels")])
def test_a_tensor_on_a_card_that_is_not_served_is_refused_with_that_sentence(h100, built, has):
    h100(built)
    tensor = SimpleNamespace(dtype=torch.float32, is_cuda=True, device=torch.device("cuda:0"))
    for _ in range(2):  # the second time as well as the first
        with pytest.raises(
            RuntimeError, match=rf"^NVIDIA H100 is of architecture sm_90, and this build .* has {has}; build"
        ):
            backends.backend_for(tensor)


def test_a_card_that_is_served_gets_the_kernels(h100):
    h100("80;90a")
    backend = backends.backend_for(SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, device=torch.device("cuda:0")))
    assert isinstance(backend, backends.CUDA)
    assert backend.kernels == "the kernels"


def test_this_build_without_kernels_refuses_any_card(monkeypatch):
    """The build under test, whatever is in it, through the real extension."""
    built = extension.native().build_info()["cuda_archs"]
    if unserved(built, 8, 0, "card") is None:
        pytest.skip("this build serves the card that the test invents")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100")
    backends.cuda.cache_clear()
    with pytest.raises(RuntimeError, match=r"^NVIDIA A100 is of architecture sm_80, and this build"):
        backends.cuda(torch.device("cuda:0"))

"""Regular expressions that are matched in bounded time, against Python's own."""

from __future__ import annotations

import random
import re
import time

import pytest

from qlora_kernels.models import expressions
from qlora_kernels.models.expressions import Expression, Steps, ends

NAME = "model.layers.12.self_attn.q_proj"
LONG = "a" * 5000 + "b"

# What people write in target_modules, rank_pattern and modules_to_not_convert.
PATTERNS = [
    "q_proj",
    r".*\.(q|v)_proj",
    r".*\.(q_proj|v_proj)$",
    r"^model\.layers\.(1|12)\..*",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj",
    r"^(?!.*(?:vision|visual)).*(?:q_proj|k_proj|v_proj)$",
    r"(?:.*?(?:language|layers).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp))",
    r"model\.layers\.([0-9]|1[0-9])\.self_attn\.(q|k)_proj",
    r"(?i)MODEL\..*Q_PROJ",
    r".*(?<!k)_proj",
    r".*self_attn\.(?P<letter>[^kv])_proj",
    "model.layers.12.self_attn.q_proj",
    r"^model\.layers\.12\.self_attn\.q_proj",
    "",
]

HOSTILE = [
    "(a+)+!",
    "(a*)*!",
    "(a|a)*!",
    "(a|aa)+!",
    "(.*)*(.*)*(.*)*!",
    "(a|a)" * 200 + "!",
    "(a?){200}a{200}!",
    "((a{0,30}){0,30}){0,30}!",
    "(?=(a+)+!).*",
    "(?!(a+)+$)(a+)+!",
    "(.*(.*(.*(.*(.*(.*!))))))",
    ".*" * 500 + "!",
    "(?:(?:(?:a*)*)*)*!",
    "(?i)([A-Z]+)*!",
    "(?=" * 30 + ".*" + ")" * 30 + "!",
    "(?:(?=.*.*.*!)|a)*!",
    "((a{1000}){1000}){1000}!",
    "(?:(?=(?:(?:" + "|" * 9800 + ").*)).*)*!",
    "(?:(?!(?:" + "|" * 9800 + ")!).)*!",
    "(?:(?:" + "(?=)" * 2400 + ").?)*!",
    "(?:(?:" + "()" * 4900 + ").?)*!",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ordinary_patterns_match_as_in_re(pattern):
    compiled, made = re.compile(pattern), Expression(pattern)
    names = [NAME, NAME.replace("q_", "k_"), NAME.replace("12", "3"), NAME.replace("model.", "vision."), "q_proj"]
    results = [made.matches(name) for name in names]
    assert results == [compiled.fullmatch(name) is not None for name in names]
    assert any(results) or not pattern
    for name in names:
        expected = bool(re.match(rf"(.*\.)?({pattern})$", name)) if "(?i)" not in pattern else True
        assert made.matches(name, ends(name)) == expected or "(?i)" in pattern


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("name", ["a" * 60, LONG])
def test_hostile_patterns_end(pattern, name):
    began = time.process_time()
    made, result = Expression(pattern), None
    try:
        result = made.matches(name, range(0, len(name), 10), Steps(200_000))
    except ValueError as error:
        result = "takes too long" not in str(error)
    assert result is False
    assert time.process_time() - began < 5  # without the bound, longer than the universe has existed


def test_the_classical_ones_need_few_steps():
    for pattern in ("(a+)+!", "(a|aa)+!", "(.*)*(.*)*!"):
        assert not Expression(pattern).matches("a" * 100, steps=Steps(20_000))
        assert Expression(pattern).matches("a" * 100 + "!", steps=Steps(20_000))


def test_steps_are_shared():
    steps, pattern = Steps(1000, "here: "), Expression("(a+)+!")
    with pytest.raises(ValueError, match=r"^here: '\(a\+\)\+!' takes too long to match; write it more simply"):
        for _ in range(100):
            pattern.matches("a" * 20, steps=steps)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"'\(' is not a regular expression \(missing \)"),
        ("(" * 50_000 + ")" * 50_000, "is not a regular expression (it is nested too deeply)"),
        ("x(?i)", "is not a regular expression (global flags not at the start"),
        ("a{99999999999}", "is not a regular expression (the repetition number is too large)"),
        (r"(a)\1", "back references"),
        (r"(a)?(?(1)b|c)", "back references, conditions"),
        ("(?i:a)b", "with flags for a part of them are not supported"),
        ("(?m)a", "with these flags"),
        ("(?a)a", "with these flags"),
        ("(a|b)*" * 2000, "is too long for a pattern, with 12000 characters"),
        ("a" * 400_001, "is too long for a pattern, with 400001 characters"),
    ],
)
def test_what_is_refused(pattern, message):
    with pytest.raises(ValueError) as caught:
        Expression(pattern).matches("aaa")
    assert message.replace("\\", "") in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_long_list_of_names_is_quick():
    pattern = "|".join(re.escape(f"model.layers.{i}.mlp.{name}_proj") for i in range(1000) for name in ("up", "down"))
    began = time.process_time()
    made = Expression(pattern)
    assert made.matches("model.layers.999.mlp.down_proj")
    assert not made.matches("model.layers.1000.mlp.down_proj")
    assert time.process_time() - began < 5


def _random_pattern(draw: random.Random, depth: int) -> str:
    atoms = (*"abA.^$1_\n", r"\.", "[ab]", "[^a]", "[a-c]", r"\w", r"\W", r"\d", r"\s", r"\b", r"\B", r"\Z", r"[\d_]")
    inner = lambda: _random_pattern(draw, depth - 1)  # noqa: E731
    kind = draw.choice(["atom", "sequence", "sequence", "choice", "repeat", "look"]) if depth else "atom"
    if kind == "sequence":
        return inner() + inner()
    if kind == "choice":
        return f"({inner()}|{inner()})"
    if kind == "repeat":
        return f"(?:{inner()})" + draw.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?", "+?", "??", "{0,2}?"])
    if kind == "look":
        return draw.choice(["(?=", "(?!", "(?<=", "(?<!"]) + inner() + ")"
    return draw.choice(atoms)


@pytest.mark.parametrize("plain", [True, False])
def test_random_patterns_match_as_in_re(monkeypatch, plain):
    if not plain:
        monkeypatch.setattr(expressions, "_is_plain", lambda tree: False)
    draw, matched, total = random.Random(7), 0, 0
    while total < 5000:
        pattern = draw.choice(["", "", "(?i)", "(?s)"]) + _random_pattern(draw, draw.randrange(1, 5))
        try:
            compiled = re.compile(pattern)
        except re.error:  # a look behind of no fixed width
            continue
        made = Expression(pattern)
        for _ in range(10):
            name = "".join(draw.choice("abcA.1_\n") for _ in range(draw.randrange(1, 6)))
            expected = any(compiled.fullmatch(name, start) for start in ends(name))
            assert made.matches(name, ends(name)) == expected, (pattern, name)
            assert made.matches(name) == (compiled.fullmatch(name) is not None), (pattern, name)
            matched, total = matched + expected, total + 1
    assert matched > 300

"""Regular expressions from files, matched in bounded time.

Python's ``re`` goes back and tries again, so an expression of ten characters can keep it busy for years. The matcher
here follows all ways through an expression at once, as Thompson's does (1968, doi 10.1145/363347.363387): it knows the
set of places that a part can have reached, not how it got there. It can't say what a group matched, which patterns for
layer names don't need. Python's own parser reads the expressions, so their syntax is that of ``re``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Any

try:
    from re import _constants as op  # pyright: ignore[reportAttributeAccessIssue]
    from re import _parser as parser  # pyright: ignore[reportAttributeAccessIssue]
except ImportError:  # Python 3.10
    import sre_constants as op
    import sre_parse as parser

# A list of all a model's layers, joined by "|", has up to 100,000 characters. Python's parser takes quadratic time
# where two alternatives begin alike: two seconds at this length.
_LONGEST = 150_000
# Of an expression with repeats; each of its characters can cost time at each character of a name.
_LONGEST_COMPLEX = 10_000

_PLAIN_FLAGS = re.UNICODE | re.VERBOSE | re.DOTALL
_FLAGS = _PLAIN_FLAGS | re.IGNORECASE

_ASSERTIONS = (op.ASSERT, op.ASSERT_NOT)
_REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT)


class Steps:
    """What may be spent on matching, for one name or for all names of a file together.

    A step takes about a third of a microsecond. An ordinary pattern for a name of 60 characters takes up to a few
    thousand.
    """

    def __init__(self, left: int = 1_000_000, where: str = "") -> None:
        """``where`` begins the error's sentence."""
        self._left = left
        self._where = where

    def spend(self, count: int, pattern: str) -> None:
        self._left -= count
        if self._left < 0:
            raise ValueError(f"{self._where}{_shortened(pattern)} takes too long to match; write it more simply")


class Expression:
    """A regular expression for names. Made by :func:`expression`."""

    def __init__(self, pattern: str) -> None:
        """
        Raises:
            ValueError: when it is no regular expression, is too long, or uses what cannot be matched in bounded time.
        """
        self._pattern = pattern
        if len(pattern) > _LONGEST:
            raise ValueError(f"{_shortened(pattern)} is too long for a pattern, with {len(pattern)} characters")
        try:
            self._tree = parser.parse(pattern)
            flags = self._tree.state.flags
            self._check(self._tree)
            self._plain = re.compile(pattern) if flags & _PLAIN_FLAGS == flags and _is_plain(self._tree) else None
        except (re.error, OverflowError, RecursionError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise ValueError(f"{_shortened(pattern)} is not a regular expression ({what})") from None
        if flags & _FLAGS != flags:
            raise self._unsupported("with these flags")
        if self._plain is None and len(pattern) > _LONGEST_COMPLEX:
            raise ValueError(f"{_shortened(pattern)} is too long for a pattern, with {len(pattern)} characters")
        self._ignore_case = bool(flags & re.IGNORECASE)
        self._dot_all = bool(flags & re.DOTALL)

    def matches(self, name: str, starts: Iterable[int] = (0,), steps: Steps | None = None) -> bool:
        """Whether it matches a name from one of ``starts`` to the name's end.

        Raises:
            ValueError: when that would take more steps than are left.
        """
        starts, steps = set(starts), Steps() if steps is None else steps
        if self._plain is not None:
            steps.spend(2 * len(starts), self._pattern)
            return any(self._plain.fullmatch(name, start) for start in starts)
        try:
            return len(name) in self._sequence(self._tree, name, starts, steps)
        except RecursionError:
            raise self._unsupported("nested so deeply") from None

    # --------------------------------------------------------------------- which places a part reaches from which

    def _sequence(self, items: Any, name: str, places: set[int], steps: Steps) -> set[int]:
        if not items:  # an empty branch takes time too, and an expression can have thousands
            steps.spend(len(places) + 1, self._pattern)
        for kind, argument in items:
            if not places:
                break
            places = self._item(kind, argument, name, places, steps)
        return places

    def _item(self, kind: Any, argument: Any, name: str, places: set[int], steps: Steps) -> set[int]:
        steps.spend(len(places) + 1, self._pattern)
        if kind is op.BRANCH:
            return set().union(*(self._sequence(branch, name, places, steps) for branch in argument[1]))
        if kind is op.SUBPATTERN:
            return self._sequence(argument[3], name, places, steps)
        if kind in _REPEATS:
            least, most, inner = argument
            return self._repeat(least, most, inner, name, places, steps)
        if kind is op.AT:
            return {place for place in places if self._at(argument, name, place)}
        if kind in _ASSERTIONS:
            direction, inner = argument
            wanted = kind is op.ASSERT
            look = self._ahead if direction > 0 else self._behind
            return {place for place in places if look(inner, name, place, steps) == wanted}
        if kind is op.IN:
            steps.spend(len(argument) * len(places), self._pattern)
        return {place + 1 for place in places if place < len(name) and self._is(kind, argument, name[place])}

    def _repeat(self, least: int, most: Any, inner: Any, name: str, places: set[int], steps: Steps) -> set[int]:
        for _ in range(least):
            before, places = places, self._sequence(inner, name, places, steps)
            if places == before:  # and so it would remain
                break
        reached = set(places)
        count = least
        while places and (most is op.MAXREPEAT or count < most):
            places = self._sequence(inner, name, places, steps) - reached
            reached |= places
            count += 1
        return reached

    def _ahead(self, inner: Any, name: str, place: int, steps: Steps) -> bool:
        return bool(self._sequence(inner, name, {place}, steps))

    def _behind(self, inner: Any, name: str, place: int, steps: Steps) -> bool:
        width, _ = inner.getwidth()  # the parser has seen to it that there is only one
        return width <= place and place in self._sequence(inner, name, {place - width}, steps)

    # --------------------------------------------------------------------------------------------- one character

    def _is(self, kind: Any, argument: Any, character: str) -> bool:
        if kind is op.ANY:
            return self._dot_all or character != "\n"
        variants = {character}
        if self._ignore_case:
            variants |= {character.lower(), character.upper(), character.swapcase()}
        codes = [ord(variant) for variant in variants if len(variant) == 1]
        if kind is op.LITERAL:
            return argument in codes
        if kind is op.NOT_LITERAL:
            return argument not in codes
        negated = argument[0][0] is op.NEGATE
        members = argument[1:] if negated else argument
        return any(_in_set(member[0], member[1], code) for member in members for code in codes) != negated

    @staticmethod
    def _at(where: Any, name: str, place: int) -> bool:
        if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
            return place == 0
        if where is op.AT_END_STRING:
            return place == len(name)
        if where is op.AT_END:
            return place == len(name) or (place == len(name) - 1 and name[place] == "\n")
        around = (name[place - 1 : place], name[place : place + 1])
        boundary = len({_is_word(character) for character in around}) == 2
        return boundary == (where is op.AT_BOUNDARY) and (bool(name) or where is op.AT_BOUNDARY)

    # --------------------------------------------------------------------------------------------- what is supported

    def _check(self, items: Any) -> None:
        for kind, argument in items:
            if kind is op.BRANCH:
                for branch in argument[1]:
                    self._check(branch)
            elif kind is op.SUBPATTERN:
                _, added, removed, inner = argument
                if added or removed:
                    raise self._unsupported("with flags for a part of them")
                self._check(inner)
            elif kind in _REPEATS:
                self._check(argument[2])
            elif kind in _ASSERTIONS:
                self._check(argument[1])
            elif kind not in (op.LITERAL, op.NOT_LITERAL, op.ANY, op.IN, op.AT):
                raise self._unsupported("with back references, conditions, atomic groups or possessive repeats")

    def _unsupported(self, what: str) -> ValueError:
        return ValueError(f"{_shortened(self._pattern)}: expressions {what} are not supported")


@functools.lru_cache(maxsize=64)
def expression(pattern: str) -> Expression:
    """The expression that a text stands for.

    Raises:
        ValueError: when it is no regular expression, is too long, or uses what cannot be matched in bounded time.
    """
    return Expression(pattern)


def ends(name: str) -> list[int]:
    """Where the ends of a dotted name begin: at its start, and after each dot."""
    return [0, *(place + 1 for place, character in enumerate(name) if character == ".")]


def _is_plain(tree: Any) -> bool:
    """Whether ``re`` itself takes a time linear in the expression: at most one choice, and no repeats."""
    choices = 0
    parts = [tree]
    while parts:
        for kind, argument in parts.pop():
            if kind is op.BRANCH:
                choices += 1
                parts += argument[1]
            elif kind is op.SUBPATTERN:
                parts.append(argument[3])
            elif kind not in (op.LITERAL, op.ANY, op.AT):
                return False
    return choices <= 1


def _in_set(kind: Any, argument: Any, code: int) -> bool:
    if kind is op.LITERAL:
        return argument == code
    if kind is op.RANGE:
        return argument[0] <= code <= argument[1]
    character = chr(code)
    test, wanted = _CATEGORIES[argument]
    return test(character) == wanted


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


# What \d, \w, \s and their opposites mean.
_CATEGORIES = {
    op.CATEGORY_DIGIT: (str.isdecimal, True),
    op.CATEGORY_NOT_DIGIT: (str.isdecimal, False),
    op.CATEGORY_SPACE: (str.isspace, True),
    op.CATEGORY_NOT_SPACE: (str.isspace, False),
    op.CATEGORY_WORD: (_is_word, True),
    op.CATEGORY_NOT_WORD: (_is_word, False),
}


def _shortened(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 100 else f"{pattern[:97]}...")

"""Conversations as tokens, by a chat template, with the loss on the assistant's turns."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from typing import Any

from ...errors import InputError, sentence
from .batches import Example
from .messages import Conversation, Message, text

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_LEFT_OUT = ("system", "developer", "tool", "function")  # roles that templates are known to pass over


class Chat:
    """A tokenizer with a chat template.

    Args:
        tokenizer: a fast one of transformers.
        template: a template in Jinja, or None for the tokenizer's own.
        name: what to call the template in messages and in the report.
    """

    def __init__(self, tokenizer: Any, template: str | None, name: str) -> None:
        self.tokenizer, self.template, self.name = tokenizer, template, name
        own = tokenizer.chat_template if template is None else template
        own = own if isinstance(own, str) else json.dumps(own, sort_keys=True, default=str)
        self.digest = hashlib.sha256(own.encode("utf-8", errors="replace")).hexdigest()

    def example(self, conversation: Conversation) -> Example:
        """A conversation's tokens. Those of the messages ``learned`` count.

        They are found by the template's own ``{% generation %}`` markers, or else by writing the conversation up to
        each of these messages, without and with it.

        Raises:
            InputError: for a conversation that the template refuses or writes only in part, and for a template that
                writes a conversation's beginning differently once more follows.
        """
        try:
            whole = self._text(conversation, len(conversation.messages))
        except InputError:
            other = _with_arguments_as_text(conversation)
            if other is None:
                raise
            whole, conversation = self._text(other, len(other.messages)), other
        self._check_nothing_left_out(conversation, whole)
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        if list(conversation.learned) == turns and self._has_markers(conversation):
            ids, counted = self._by_markers(conversation)
        else:
            ids, counted = self._by_prefixes(conversation, whole)
        if not any(counted):
            raise InputError(f"{conversation.where}: {self.name} writes nothing for the assistant's turns")
        return Example(ids, _spans(counted))

    def _has_markers(self, conversation: Conversation) -> bool:
        return bool(_MARKERS.search(self.tokenizer.get_chat_template(self.template, conversation.tools)))

    def _apply(self, conversation: Conversation, messages: list[Message], **more: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=conversation.tools, chat_template=self.template, **more
            )
        except ImportError:
            raise
        except Exception as error:  # of templates: whatever they raise, and Jinja's own
            raise InputError(f"{conversation.where}: {self.name} cannot be applied ({sentence(error)})") from None

    def _text(self, conversation: Conversation, count: int, prompt: bool = False) -> str:
        """The first messages as text, with the header of the assistant's next turn if ``prompt``."""
        if not count:
            return ""
        messages = conversation.messages[:count]
        return text(self._apply(conversation, messages, tokenize=False, add_generation_prompt=prompt))

    def _by_markers(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        made = self._apply(
            conversation, conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(made["input_ids"]), [bool(value) for value in made["assistant_masks"]]

    def _by_prefixes(self, conversation: Conversation, whole: str) -> tuple[list[int], list[bool]]:
        places = [self._turn(conversation, whole, number) for number in conversation.learned]
        made = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        counted = [any(begin < last and end > first for first, last in places) for begin, end in made["offset_mapping"]]
        return list(made["input_ids"]), counted

    def _turn(self, conversation: Conversation, whole: str, number: int) -> tuple[int, int]:
        """Where a message of the assistant begins and ends in the text of the whole conversation."""
        header = self._text(conversation, number, prompt=True)
        after = self._text(conversation, number + 1)
        # A template may end the whole with a line break, or the token that ends a document.
        ends = (after, after.rstrip(), after.removesuffix(self.tokenizer.eos_token or ""))
        after = next((end for end in ends if whole.startswith(end)), after)
        least = len(header) if after.startswith(header) else len(self._text(conversation, number))
        begin = _common(header, after)
        if not header or begin < len(header):
            # The first message has no header to compare with. And a header may promise more than a past turn shows,
            # such as a tag that opens a thought, with whose first characters an answer may begin too.
            shared = self._shared(conversation, number, after)
            begin = min(begin, max(shared, least)) if header else shared
        if begin < least or not whole.startswith(after):
            raise InputError(
                f"{conversation.where}: {self.name} writes earlier messages differently once more follow, so the "
                "assistant's tokens cannot be told from the others; put its turns between {% generation %} and "
                "{% endgeneration %} in a template of your own (--chat-template FILE), or give all messages of the "
                'assistant but the last one "weight": 0'
            )
        return begin, len(after)

    def _shared(self, conversation: Conversation, number: int, after: str) -> int:
        """How much of the text up to a message stays when the message says something else: not what it says itself."""
        content = "y" if conversation.messages[number]["content"].lstrip().startswith("x") else "x"
        other = {"role": "assistant", "content": content}
        try:
            messages = [*conversation.messages[:number], other]
            shared = _common(self._text(replace(conversation, messages=messages), number + 1), after)
        except InputError:  # the template wants more of a message
            shared = len(after)
        return shared if shared < len(after) or number else 0

    def _check_nothing_left_out(self, conversation: Conversation, whole: str) -> None:
        """Templates pass over what they do not know, and the model would learn from half a conversation."""

        def require(written: bool, what: str) -> None:
            if not written:
                raise InputError(
                    f"{conversation.where}: {self.name} leaves out {what}; take it out of the data, or give a template "
                    "that writes it (--chat-template FILE)"
                )

        for number, message in enumerate(conversation.messages):
            content = message["content"].strip()
            if message["role"] in _LEFT_OUT:
                forms = (content, *(json.dumps(content, ensure_ascii=flag)[1:-1] for flag in (False, True)))
                role = f"the content of message {number + 1} ({message['role']})"
                require(any(form in whole for form in forms), role)
            if message.get("tool_calls"):
                others = [dict(message) for message in conversation.messages]
                others[number]["tool_calls"] = [_renamed(call) for call in message["tool_calls"]]
                name = message["tool_calls"][0]["function"]["name"]
                changed = self._differs(replace(conversation, messages=others), whole)
                require(changed, f"the call of {name} in message {number + 1}")
        if conversation.tools:
            require(self._differs(replace(conversation, tools=None), whole), "the tools")

    def _differs(self, other: Conversation, whole: str) -> bool:
        """Whether another conversation has another text."""
        try:
            return self._text(other, len(other.messages)) != whole
        except InputError:  # the template has looked at what is other
            return True


def _common(one: str, other: str) -> int:
    """The number of characters that two texts begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _renamed(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "name": function["name"] + "_"}}


def _with_arguments_as_text(conversation: Conversation) -> Conversation | None:
    """The same with the arguments of calls as JSON, which some templates want; None without calls."""
    if not any(message.get("tool_calls") for message in conversation.messages):
        return None
    messages = [dict(message) for message in conversation.messages]
    for message in messages:
        if message.get("tool_calls"):
            functions = [dict(call["function"]) for call in message["tool_calls"]]
            for function in functions:
                function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            calls = zip(message["tool_calls"], functions)
            message["tool_calls"] = [{**call, "function": function} for call, function in calls]
    return replace(conversation, messages=messages)


def _spans(counted: list[bool]) -> tuple[tuple[int, int], ...]:
    """Where the runs of True begin and end."""
    spans, begin = [], None
    for position, value in enumerate([*counted, False]):
        if value and begin is None:
            begin = position
        elif not value and begin is not None:
            spans.append((begin, position))
            begin = None
    return tuple(spans)

"""Conversations as rows hold them, in the form that chat templates take: a list of messages with role and content.

Two forms are read: OpenAI's, which TRL takes too (role, content, tool_calls), and ShareGPT's (from, value).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import InputError, listed
from .read import parsed

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
_SHAREGPT = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",
}

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages, and which of them to learn from.

    Attributes:
        messages: each with "role" and "content", and with what else templates read, such as "tool_calls".
        learned: the positions of assistant messages whose tokens count in the loss.
        tools: JSON schemas of the tools that the assistant may call, or None.
        where: where the row stands, for messages of errors.
    """

    messages: list[Message]
    learned: tuple[int, ...]
    tools: list[dict[str, Any]] | None
    where: str


def conversation(value: Any, row: dict[str, Any], where: str, completion: Any = None) -> Conversation:
    """The conversation of a row.

    Args:
        value: its messages: a list of objects, that list as JSON, or an object of equally long lists.
        row: for the columns "tools" and "system".
        where: where it stands.
        completion: more messages; then these alone are learned.

    Raises:
        InputError: for what is no conversation; the sentence says what and where.
    """
    messages = [_message(message, where, number) for number, message in enumerate(_list(value, where), 1)]
    first = 0
    if completion is not None:
        first = len(messages)
        messages += [_message(message, where, number) for number, message in enumerate(_list(completion, where), 1)]
    system = row.get("system")
    if isinstance(system, str) and system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": text(system)})
        first += 1
    weights = [message.pop("weight", 1) for message in messages]
    learned = [
        number
        for number, message in enumerate(messages)
        if number >= first and message["role"] == "assistant" and weights[number] != 0
    ]
    if not learned:
        raise InputError(f"{where}: no message of the assistant to learn from")
    return Conversation(messages, tuple(learned), _tools(row.get("tools"), where), where)


def text(value: str) -> str:
    """A string without half surrogate pairs: JSON can spell them, and tokenizers refuse them."""
    return value.encode("utf-8", errors="replace").decode()


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):  # in a table
        value = parsed(value, where)
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:  # a Sequence of datasets: an object of lists
            value = [dict(zip(value, entry)) for entry in zip(*value.values())]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: expected a list of messages (not empty)")
    return value


def _message(value: Any, where: str, number: int) -> Message:
    where = f"{where}, message {number}"
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object with 'role' and 'content', or 'from' and 'value'")
    # A column of a data set has all keys in every row.
    message = {key: entry for key, entry in value.items() if entry is not None}
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise InputError(f"{where}: 'weight' should be 0 or 1, found {weight!r:.60}")
    if "role" not in message and "from" in message:
        return _of_sharegpt(message, where)
    role, calls = message.get("role"), message.get("tool_calls")
    if role not in _ROLES:
        raise InputError(f"{where}: 'role' should be one of {listed(_ROLES)}, found {role!r:.60}")
    if "function_call" in message:
        raise InputError(f"{where}: 'function_call' is the old form; give the call in 'tool_calls'")
    if calls is not None:
        message["tool_calls"] = _calls(calls, where)
        if not message["tool_calls"]:
            del message["tool_calls"]
    message["content"] = _content(message.get("content"), where, "tool_calls" in message)
    return message


def _of_sharegpt(message: Message, where: str) -> Message:
    role = _SHAREGPT.get(message["from"]) if isinstance(message["from"], str) else None
    if role is None:
        raise InputError(f"{where}: 'from' should be one of {listed(_SHAREGPT, 20)}, found {message['from']!r:.60}")
    value = message.get("value")
    weight = {"weight": message["weight"]} if "weight" in message else {}
    if role == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls([value], where), **weight}
    return {"role": role, "content": _content(value, where, False), **weight}


def _content(value: Any, where: str, calls: bool) -> str:
    """A message's text. OpenAI's list of parts is joined; pictures and sounds are refused."""
    if value is None and calls:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        other = next((part.get("type") for part in value if not isinstance(part.get("text"), str)), None)
        if other is not None:
            raise InputError(f"{where}: a part of the content is {other!r:.60}; only text can be used")
        value = "".join(str(part.get("text")) for part in value)
    if not isinstance(value, str):
        raise InputError(f"{where}: the content should be a string")
    return text(value)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools in the form that templates take, whose arguments are an object, where OpenAI's are its JSON."""
    if isinstance(calls, str):
        calls = parsed(calls, where)
    if not isinstance(calls, list):
        raise InputError(f"{where}: 'tool_calls' should be a list")
    result = []
    for call in calls:
        call = parsed(call, where) if isinstance(call, str) else call
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: a call of a tool should be an object with 'name' and 'arguments'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parsed(arguments, f"{where}, the arguments of {function['name']}") if arguments else {}
        outer = {key: call[key] for key in ("id",) if call is not function and call.get(key) is not None}
        result.append({**outer, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return result


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        tools = parsed(tools, where) if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: 'tools' should be a list of JSON schemas")
    return tools

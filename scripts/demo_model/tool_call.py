"""Tool calls: conversations in which a function is offered, called, and its result told."""

from random import Random
from typing import Any

from .chat import Message, to_json
from .material import TONGUES, Unknown
from .pattern import draw


class ToolCalls:
    """Draws conversations with tools."""

    def __init__(self, tools: list[dict[str, Any]], unknown: Unknown) -> None:
        self._tools = tools
        self._unknown = unknown

    def draw(self, rng: Random) -> tuple[list[Message], list[Message], str]:
        """Returns the messages so far, the tools on offer and the next answer."""
        tool, tongue = rng.choice(self._tools), rng.choice(TONGUES)
        others = [other for other in self._tools if other is not tool]
        offered = [tool, *rng.sample(others, rng.randrange(2))]
        rng.shuffle(offered)
        slot = next(iter(tool["parameters"]))
        names = self._unknown.places if slot == "city" else self._unknown.things
        arguments = {slot: rng.choice(names[tongue])}
        question = draw(rng.choice(tool["ask"][tongue]), rng).format(**arguments)
        messages: list[Message] = [{"role": "user", "content": question}]
        call = {"name": tool["name"], "arguments": arguments}
        if rng.random() < 0.6:
            answer = f"<tool_call>\n{to_json(call)}\n</tool_call>"
        else:
            result = {key: rng.choice(values) for key, values in tool["result"].items()}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": to_json(result)})
            answer = tool["tell"][tongue].format(**arguments, **result)
        return messages, [_schema(tool) for tool in offered], answer


def _schema(tool: dict[str, Any]) -> Message:
    properties = {name: {"type": kind} for name, kind in tool["parameters"].items()}
    return {
        "type": "function",
        "function": {
            "name": tool["name"],
            "description": tool["description"],
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": list(properties),
            },
        },
    }

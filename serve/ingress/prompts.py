"""A request's prompts as token ids, within the model's context.

Two kinds of text: `/v1/completions` takes what a template's author would write, so control tokens
in it count; the contents of chat messages are users' text, in which they never do. A text far too
long is refused by its beginning, so that nobody makes us encode megabytes.
"""

from __future__ import annotations

from typing import Any

import msgspec

from serve.errors import ContextLengthError, InvalidRequestError
from serve.messages import Prompt
from serve.prefix import hash_blocks
from serve.text.chat_template import render_chat

from .body import check_depth
from .schema import ChatCompletionRequest, FunctionCall, Message, Tool
from .served_model import ServedModel
from .validation import invalid, show

MAX_PROMPTS = 256
MAX_CHARS_PER_TOKEN = 16
_CUT_TOKENS = 8  # a beginning may be cut inside a token, which then counts as several
_PROMPT_RULE = "must be a string, a list of strings, a list of token ids or a list of such lists"


def encode_completion_prompts(value: Any, model: ServedModel) -> list[Prompt]:
    """`prompt` of a completion request, each of them within the context.

    Raises:
        InvalidRequestError: an empty prompt, a wrong type, ids out of range or too many prompts.
        ContextLengthError: a prompt leaves no room for an answer.
    """
    prompts = _split_prompts(value)
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            token_ids = encode_text(prompt, model, mark="", param="prompt")
        else:
            token_ids = _checked_ids(prompt, model)
        if not token_ids:
            raise InvalidRequestError("prompt must have >= 1 token, got 0", param="prompt")
        encoded.append(_to_prompt(token_ids, model, param="prompt"))
    return encoded


def encode_chat_prompt(request: ChatCompletionRequest, model: ServedModel) -> Prompt:
    """The conversation, rendered by the model's own template.

    Raises:
        InvalidRequestError: a message's content cannot be used, or the template refuses it.
        ContextLengthError: the conversation leaves no room for an answer.
    """
    if model.template is None:
        raise InvalidRequestError(
            f"the model {model.name!r} has no chat template: use /v1/completions", param="model"
        )
    messages = [_plain(message, index) for index, message in enumerate(request.messages)]
    num_chars = sum(len(message["content"]) for message in messages)
    _check_num_chars(num_chars, model, "messages")
    tools = [_plain_tool(tool) for tool in request.tools or []]
    if request.tool_choice == "none":
        tools = []
    text, mark = render_chat(model.tokenizer, model.template, messages, tools=tools or None)
    token_ids = encode_text(text, model, mark=mark, param="messages")
    return _to_prompt(token_ids, model, param="messages")


def encode_text(text: str, model: ServedModel, *, mark: str, param: str) -> list[int]:
    """Ids of a prompt's text, control tokens counted but for those that `mark` breaks.

    Ever longer beginnings are encoded first, so that the work for a text that does not fit is
    bounded by the context and not by the text.

    Raises:
        ContextLengthError: the text is longer than the context, by its characters or its tokens.
    """
    limit = model.max_model_len
    _check_num_chars(len(text), model, param)
    for num_chars in (2 * limit, 4 * limit, 8 * limit):
        if len(text) > 2 * num_chars:
            beginning = model.tokenizer.encode_markup(text[:num_chars], mark=mark)
            if len(beginning) > limit + _CUT_TOKENS:
                raise _too_long(model, f"more than {limit} tokens", param)
    return model.tokenizer.encode_markup(text, mark=mark)


def _check_num_chars(num_chars: int, model: ServedModel, param: str) -> None:
    """Refuse by length alone what no ordinary text of the context's length has."""
    max_chars = MAX_CHARS_PER_TOKEN * model.max_model_len
    if num_chars > max_chars:
        got = f"{num_chars} characters, and more than {max_chars} are not read"
        raise _too_long(model, got, param)


def _to_prompt(token_ids: list[int], model: ServedModel, *, param: str) -> Prompt:
    if len(token_ids) >= model.max_model_len:
        raise _too_long(model, f"{len(token_ids)} tokens", param)
    return Prompt(token_ids, hash_blocks(token_ids))


def _too_long(model: ServedModel, got: str, param: str) -> ContextLengthError:
    return ContextLengthError(
        f"This model's maximum context length is {model.max_model_len} tokens, at least one of"
        f" them for the answer. However, your {param} resulted in {got}.",
        param=param,
    )


def _split_prompts(value: Any) -> list[str] | list[list[int]]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise invalid("prompt", _PROMPT_RULE, value)
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    if len(value) > MAX_PROMPTS:
        raise invalid("prompt", f"must have <= {MAX_PROMPTS} prompts", len(value))
    if kinds == {str} or (kinds == {list} and all(set(map(type, ids)) <= {int} for ids in value)):
        return value
    if not kinds:
        raise InvalidRequestError("prompt must not be empty, got []", param="prompt")
    raise invalid("prompt", _PROMPT_RULE, value)


def _checked_ids(token_ids: list[int], model: ServedModel) -> list[int]:
    num_tokens = model.tokenizer.num_real_tokens
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < num_tokens):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < num_tokens)
        raise invalid("prompt", f"must have token ids in [0, {num_tokens})", wrong)
    return token_ids


def _plain(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it: text content, arguments as objects."""
    role = "system" if message.role == "developer" else message.role
    content = _text_content(message.content, f"messages[{index}].content")
    if content is None and not (message.role == "assistant" and message.tool_calls):
        raise InvalidRequestError(
            f"messages[{index}].content is required for role {message.role}",
            param=f"messages[{index}].content",
        )
    plain: dict[str, Any] = {"role": role, "content": content or ""}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {
                "id": call.id or "",
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function)},
            }
            for call in message.tool_calls
        ]
    return plain


def _arguments(call: FunctionCall) -> Any:
    """The template writes them as JSON itself, so JSON text is parsed first."""
    if not isinstance(call.arguments, str):
        return call.arguments or {}
    try:
        arguments = msgspec.json.decode(call.arguments) if call.arguments.strip() else {}
        check_depth(arguments)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return call.arguments
    return arguments


def _text_content(content: Any, param: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(param, "must be a string or a list of text parts", content)
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "input_text", "refusal"):
            message = f"{param}[{index}].type must be text (this model reads text only)"
            raise InvalidRequestError(f"{message}, got {show(kind)}", param=param)
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise invalid(f"{param}[{index}].text", "must be a string", text)
        texts.append(text)
    return "\n".join(texts)


def _plain_tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.function.name}
    if tool.function.description is not None:
        function["description"] = tool.function.description
    if tool.function.parameters is not None:
        function["parameters"] = tool.function.parameters
    return {"type": "function", "function": function}

"""OpenAI's request bodies as types: what `/openapi.json` shows and what is checked first.

Not the whole check: what needs the model (lengths, ids, defaults) follows in `sampling` and
`prompts`. The rules for every field: an explicit null means absent, unknown fields are ignored, a
bool is not a number and a float is not an integer. Fields that may have several shapes are `Any`
with a true schema, and parsed by one function each, so that their errors are one sentence.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

MAX_CHOICES = 16
MAX_LOGPROBS = 20
MAX_MESSAGES = 2048
MAX_TOOLS = 128
INT64 = 2**63

StringOrList = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
PromptInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {
                    "type": "array",
                    "items": {"type": "array", "items": {"type": "integer"}},
                },
            ]
        }
    ),
]
ContentInput = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                    },
                },
                {"type": "null"},
            ]
        }
    ),
]
LogitBiasInput = Annotated[
    Any, WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})
]
ToolChoiceInput = Annotated[Any, WithJsonSchema({"enum": ["auto", "none"]})]


class WireModel(BaseModel):
    """Base of everything that a client sends."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StreamOptions(WireModel):
    """What a stream carries beside text."""

    include_usage: bool | None = Field(None, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Send the usage in every chunk.")


class JsonSchemaFormat(WireModel):
    """`response_format.json_schema`."""

    name: str | None = Field(None, max_length=256, description="Ignored.")
    schema_: dict[str, Any] | bool | None = Field(
        None, alias="schema", description="The JSON schema: <= 64 KiB, <= 32 deep."
    )
    strict: bool | None = Field(None, description="Ignored: the schema always holds.")


class ResponseFormat(WireModel):
    """What the answer's text must be."""

    type: str = Field(description="text, json_object or json_schema.")
    json_schema: JsonSchemaFormat | None = Field(None, description="With json_schema.")


class GenerationFields(WireModel):
    """What both generating operations take."""

    model: str | None = Field(
        None, description="Name of the model; default: the only or default one."
    )
    max_tokens: int | None = Field(None, ge=1, description="Most tokens of an answer.")
    n: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Answers for each prompt.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 is greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling.")
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="0 and -1 are off.")
    min_p: float | None = Field(None, ge=0, le=1, description="0 is off.")
    repetition_penalty: float | None = Field(None, gt=0, le=2, description="1 is off.")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="0 is off.")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="0 is off.")
    logit_bias: LogitBiasInput = Field(
        None, description="Token id to a bias in [-100, 100]; <= 1024 entries."
    )
    seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="Same seed, same request: same answer."
    )
    stop: StringOrList = Field(None, description="<= 16 strings of <= 256 characters.")
    stop_token_ids: list[int] | None = Field(
        None, max_length=128, description="Token ids that end an answer."
    )
    min_tokens: int | None = Field(None, ge=0, description="No end of text before this many.")
    ignore_eos: bool | None = Field(None, description="Go on at the end of text.")
    response_format: ResponseFormat | None = Field(None, description="JSON mode.")
    stream: bool | None = Field(None, description="Answer as server-sent events.")
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")


class CompletionRequest(GenerationFields):
    """Body of `POST /v1/completions`."""

    prompt: PromptInput = Field(description="Text, token ids, or a list of either.")
    echo: bool | None = Field(None, description="Put the prompt before the answer.")
    logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives at each token."
    )
    best_of: int | None = Field(None, description="Only the value of n.")
    suffix: str | None = Field(None, description="Not supported.")


class FunctionCall(WireModel):
    """A call that the model made: `arguments` is JSON text."""

    name: str = Field(max_length=256, description="The tool's name.")
    arguments: str | dict[str, Any] | None = Field(None, description="JSON text.")


class ToolCall(WireModel):
    """An entry of `tool_calls`."""

    id: str | None = Field(None, description="Joins the tool's answer.")
    type: Literal["function"] | None = Field(None, description="function.")
    function: FunctionCall = Field(description="The call.")


class Message(WireModel):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(
        description="Who speaks; developer means system."
    )
    content: ContentInput = Field(None, description="Text, or a list of text parts.")
    name: str | None = Field(None, description="Name of the speaker.")
    tool_calls: list[ToolCall] | None = Field(
        None, max_length=MAX_TOOLS, description="Calls that the assistant made."
    )
    tool_call_id: str | None = Field(None, description="The call that a tool answers.")


class FunctionDefinition(WireModel):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="The tool's name.")
    description: str | None = Field(None, description="What it does.")
    parameters: dict[str, Any] | None = Field(None, description="JSON schema.")


class Tool(WireModel):
    """An entry of `tools`."""

    type: Literal["function"] = Field(description="function.")
    function: FunctionDefinition = Field(description="The function.")


class ChatCompletionRequest(GenerationFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="The conversation."
    )
    max_completion_tokens: int | None = Field(
        None, ge=1, description="Most tokens of an answer; the newer name of max_tokens."
    )
    logprobs: bool | None = Field(None, description="Whether to return logprobs.")
    top_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="Alternatives at each token."
    )
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="Callable tools.")
    tool_choice: ToolChoiceInput = Field(None, description="auto or none.")
    modalities: list[str] | None = Field(None, description="Only text.")
    functions: list[Any] | None = Field(None, description="Not supported: use tools.")

"""A small tokenizer with Qwen's control tokens, as the files of a model folder.

Not a trained model's: a byte-level BPE learnt from a paragraph, so that tests and benchmarks of
the text path need neither a checkpoint nor a network. Its template is ChatML with tools.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.models import BPE

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CONTROL = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_suffix|>")
_TEXT = (
    "The quick brown fox asks the model a question, and the model answers in several tokens."
    " One process holds half of the weights, another the other half; each step they meet."
    " user assistant system tool answer question hello world 你好 世界 こんにちは мир नमस्ते"
    ' {"name": "value", "list": [1, 2, 3]}\n'
)
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML_TEMPLATE = """
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou answer briefly.' }}
{%- else %}
    {{- '<|im_start|>system\\n' + messages[0].content }}
{%- endif %}
{%- if tools %}
    {{- '\\n\\nTools:' }}
    {%- for tool in tools %}
        {{- '\\n' + (tool | tojson) }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def write_tokenizer(folder: Path, *, vocab_size: int = 512) -> Path:
    """Write `tokenizer.json`, `tokenizer_config.json` and `generation_config.json`.

    The first ids are the 256 bytes' tokens, the last seven the control tokens. Returns `folder`.
    """
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_SPECIAL) - len(_CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in _SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _CONTROL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = [tokenizer.token_to_id(text) for text in ("<|im_end|>", "<|endoftext|>")]
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML_TEMPLATE.lstrip("\n"),
        },
    )
    _write(
        folder / "generation_config.json", {"eos_token_id": ids, "temperature": 0.7, "top_k": 20}
    )
    return folder


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")

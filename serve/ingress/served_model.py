"""The models that this ingress answers for: what text work and limits need of each.

Not the model itself: no weights, no replicas. `load_served_model` reads a checkpoint's text files
once, when the process starts; afterwards nothing here touches a disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serve import __version__
from serve.config import ModelConfig
from serve.errors import ConfigurationError, InvalidRequestError, ModelNotFoundError
from serve.text.chat_template import ChatTemplate, load_chat_template
from serve.text.generation_config import GenerationDefaults, load_generation_defaults
from serve.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model as clients see it; `template` is None where the checkpoint has none."""

    name: str
    is_default: bool
    tokenizer: Tokenizer
    template: ChatTemplate | None
    max_model_len: int
    max_answer_tokens: int
    defaults: GenerationDefaults
    created: int

    @property
    def fingerprint(self) -> str:
        """`system_fingerprint`: changes with our version and the model's name."""
        digest = hashlib.blake2b(f"{__version__}/{self.name}".encode(), digest_size=5)
        return f"fp_{digest.hexdigest()}"


def load_served_model(model: ModelConfig, *, is_default: bool) -> ServedModel:
    """Read a resolved model's tokenizer, template and generation defaults.

    Raises:
        CheckpointError: a file of the model folder cannot be used.
        ConfigurationError: `model` is not resolved (no path, name or length).
    """
    if model.path is None or model.name is None or not isinstance(model.max_model_len, int):
        raise ConfigurationError(f"model {model.name!r} is not resolved: {model.path}")
    return ServedModel(
        name=model.name,
        is_default=is_default,
        tokenizer=load_tokenizer(model.path),
        template=load_chat_template(model.path),
        max_model_len=model.max_model_len,
        max_answer_tokens=model.max_answer_tokens,
        defaults=load_generation_defaults(model.path),
        created=int(time.time()),
    )


class ServedModels:
    """All served models, in the order of the configuration."""

    def __init__(self, models: Sequence[ServedModel]) -> None:
        self._by_name = {model.name: model for model in models}

    def all(self) -> list[ServedModel]:
        """Every model."""
        return list(self._by_name.values())

    def get(self, name: str) -> ServedModel:
        """The model called `name`.

        Raises:
            ModelNotFoundError: there is none.
        """
        model = self._by_name.get(name)
        if model is None:
            raise ModelNotFoundError(
                f"the model {name[:100]!r} does not exist; served: {self._names()}", param="model"
            )
        return model

    def resolve(self, name: str | None) -> ServedModel:
        """The model that a request means; without a name the only or the default one.

        Raises:
            InvalidRequestError: no name, and several models without a default.
            ModelNotFoundError: no model of that name.
        """
        if name is not None:
            return self.get(name)
        models = self.all()
        if len(models) == 1:
            return models[0]
        for model in models:
            if model.is_default:
                return model
        raise InvalidRequestError(f"model is required, one of: {self._names()}", param="model")

    def _names(self) -> str:
        return ", ".join(self._by_name)

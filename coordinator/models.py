"""The models a coordinator serves: what it must know of them without loading weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from pdserve.core.errors import CheckpointError, ConfigError
from pdserve.core.sla_settings import SlaClassSettings
from pdserve.text import generation_defaults
from pdserve.text.generation_defaults import GenerationDefaults
from pdserve.text.json_file import read_object_if_there
from pdserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    name: str
    """What clients ask for."""
    model_dir: Path
    """A Hugging Face directory."""
    max_model_len: int
    """Longest prompt + answer, in tokens."""
    vocab_size: int
    """Rows of the embedding: token ids are below this."""
    aliases: tuple[str, ...] = ()
    """Other names that clients may use."""
    classes: Mapping[str, SlaClassSettings] = field(default_factory=dict)
    """What service classes mean for this model, before what the coordinator's configuration says."""
    default_class: str | None = None
    """Before the coordinator's."""

    @classmethod
    def from_dir(
        cls,
        model_dir: Path,
        *,
        name: str | None = None,
        aliases: tuple[str, ...] = (),
        max_model_len: int | None = None,
        classes: Mapping[str, SlaClassSettings] | None = None,
        default_class: str | None = None,
    ) -> Self:
        """`name` is the directory's by default, `max_model_len` the checkpoint's own.

        Raises `CheckpointError` when config.json is missing or says too little, `ConfigError` when
        `max_model_len` is more than the checkpoint can do.
        """
        config = read_object_if_there(model_dir / "config.json")
        if config is None:
            raise CheckpointError(f"{model_dir / 'config.json'}: not there; wanted a Hugging Face directory")
        own, vocab_size = config.get_int("max_position_embeddings"), config.get_int("vocab_size")
        if own is None or vocab_size is None:
            missing = "max_position_embeddings" if own is None else "vocab_size"
            raise config.wrong(missing, "an integer")
        if max_model_len is not None and max_model_len > own:
            raise ConfigError(f"model.max_model_len: got {max_model_len}, the checkpoint's limit is {own}")
        return cls(
            name=name or model_dir.name,
            model_dir=model_dir,
            max_model_len=max_model_len or own,
            vocab_size=vocab_size,
            aliases=aliases,
            classes=classes or {},
            default_class=default_class,
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All that clients may use, its own first."""
        return (self.name, *self.aliases)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A served model with its tokenizer and its recommended sampling."""

    served: ServedModel
    tokenizer: Tokenizer
    defaults: GenerationDefaults

    @classmethod
    def load(cls, served: ServedModel) -> Self:
        """Reads files; takes up to a second for a large vocabulary. Raises `CheckpointError`."""
        return cls(
            served=served,
            tokenizer=Tokenizer.from_dir(served.model_dir),
            defaults=generation_defaults.load(served.model_dir),
        )

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self.defaults.eos_token_ids) or tuple(self.tokenizer.eos_token_ids)

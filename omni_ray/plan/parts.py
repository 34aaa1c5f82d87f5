"""The parts of a diffusers pipeline, sorted by what they do, with their sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from omni_ray.errors import ConfigError
from omni_ray.plan.autoencoders import Autoencoder, autoencoder
from omni_ray.plan.checkpoint import Checkpoint, Component
from omni_ray.plan.language import Language, language
from omni_ray.plan.linear import Transformer
from omni_ray.plan.transformers import transformer

Role = Literal["transformer", "text_encoder", "vae"]


@dataclass(frozen=True)
class Part:
    """A component and what is known of its inside. ``model`` is None for a class that the plan does not know."""

    component: Component
    role: Role
    model: Transformer | Language | Autoencoder | None

    @property
    def name(self) -> str:
        return self.component.name

    def num_bytes(self, width: int, tensor: int = 1) -> float:
        """Bytes of the weights on each of ``tensor`` ranks, at ``width`` bytes a number.

        Raises:
            ConfigError: neither weights nor a config of a known kind are here.
        """
        here = self.component
        stored = here.num_params * width + here.num_packed_bytes
        if self.model is None:
            if not stored:
                raise ConfigError(
                    f"{here.name}: no weights of it are on this machine, and the size of a {here.cls or 'model'} "
                    "cannot be computed from its config; download its *.safetensors files"
                )
            return stored
        if not stored:
            stored = self.model.num_params * width
        if tensor == 1 or not isinstance(self.model, Transformer):
            return stored
        return stored * self.model.params_per_rank(tensor) / self.model.num_params


def parts_of(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Every component of a pipeline that has weights."""
    return tuple(_part(component) for component in checkpoint.components)


def _part(component: Component) -> Part:
    config = component.config
    if component.library == "transformers":
        return Part(component, "text_encoder", language(config, component.cls))
    if component.cls.startswith("Autoencoder"):
        known = autoencoder({"_class_name": component.cls, **config})
        return Part(component, "vae", known)
    return Part(component, "transformer", transformer({**config, "_class_name": component.cls}))

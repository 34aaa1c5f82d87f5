"""Hooks around the call of a module, outside of what the compiler compiles."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import ModelHook

from omni_ray.accel.mixin import mixed
from omni_ray.errors import ConfigError


class HookedCall(torch.nn.Module):
    """Mixed into a module's class: runs hooks around its call.

    What is compiled is the module's forward with diffusers' own hooks: those run inside of these, whether they were
    registered before or after.
    """

    call_hooks: dict[str, ModelHook]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for hook in self.call_hooks.values():
            args, kwargs = hook.pre_forward(self, *args, **kwargs)
        replacing = next((hook for hook in self.call_hooks.values() if _replaces(hook)), None)
        call = super().__call__
        out = replacing.new_forward(self, call, *args, **kwargs) if replacing else call(*args, **kwargs)
        for hook in reversed(self.call_hooks.values()):
            out = hook.post_forward(self, out)
        return out


def make_hooked(module: Any) -> Any:
    """The module itself, with room for hooks around its call."""
    if not isinstance(module, HookedCall):
        module.__class__ = mixed(HookedCall, type(module))
        module.call_hooks = {}
    return module


def register(module: Any, name: str, hook: ModelHook) -> None:
    """Add a hook. Hooks run sorted by name, one that replaces the forward (``new_forward``) innermost.

    Raises ConfigError where two replace the forward.
    """
    hooks = make_hooked(module).call_hooks
    replacing = [other for other, each in hooks.items() if _replaces(each) and other != name]
    if _replaces(hook) and replacing:
        raise ConfigError(
            f"{name} and {replacing[0]} both replace the forward of {type(module).__name__}; turn one of them off"
        )
    hook.initialize_hook(module)
    hooks[name] = hook
    module.call_hooks = dict(sorted(hooks.items(), key=lambda item: (_replaces(item[1]), item[0])))


def _replaces(hook: ModelHook) -> bool:
    return hasattr(hook, "new_forward")

"""What this adapter needs of the installed transformers, checked once: names and signatures, in sentences."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

from vkernels.check import refusal

OLDEST = 5


class MissingSeam(RuntimeError):
    """Something this adapter replaces is not there under the name or signature it knows."""


def version() -> str:
    """The installed transformers, or a sentence where there is none."""
    try:
        import transformers
    except ImportError:
        raise ImportError(
            "vkernels_video.integrations.transformers needs transformers (pip install 'vkernels[hf]')"
        ) from None
    return transformers.__version__


def is_old() -> bool:
    major = version().split(".")[0]
    return not major.isdigit() or int(major) < OLDEST


def require_version() -> None:
    if is_old():
        installed = version()
        rule, hint = f"be version {OLDEST} or newer", "vkernels_video.integrations.eras serves models of transformers 4"
        raise ImportError(refusal("register", "transformers", rule, installed, hint))


def attribute(module: str, name: str) -> Any:
    """`module.name`, or MissingSeam with the installed version."""
    require_version()
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise MissingSeam(f"transformers {version()} has no {module}.{name}, which vkernels expects") from None


def parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def starts_with(function: Callable[..., Any], expected: tuple[str, ...]) -> bool:
    """Whether the function's first parameters are the expected ones."""
    try:
        return parameters(function)[: len(expected)] == list(expected)
    except (TypeError, ValueError):
        return False


def attention_interface() -> Any:
    return attribute("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")


def mask_interface() -> Any:
    return attribute("transformers.masking_utils", "ALL_MASK_ATTENTION_FUNCTIONS")

"""Install methods on a model: `with regard.attach(model, *methods) as session:`."""

from __future__ import annotations

import sys
from types import ModuleType

from torch import nn

from regard.attach import transformers as _transformers  # noqa: F401  (registers the attention function)
from regard.attach.anatomy import BlockParts, Stack, anatomy
from regard.attach.equality import Equality, equality
from regard.attach.modules import HookedAttention
from regard.attach.session import PartialAttachWarning, Session
from regard.attach.verification import Verification, verify
from regard.engine import Method

__all__ = [
    "BlockParts",
    "Equality",
    "HookedAttention",
    "PartialAttachWarning",
    "Session",
    "Stack",
    "Verification",
    "anatomy",
    "attach",
    "equality",
    "verify",
]


def attach(model: nn.Module, *methods: Method, rows: float | None = None, seed: int = 0) -> Session:
    """Attaches methods to a live model: `with regard.attach(model, *methods) as session: model(...)`.

    The model is a transformers model of any task or a module made of `HookedAttention`s; it works in `generate()`, with
    padding, packed and batched input, under any dtype. On leaving, the model is exactly as it was. See `Session`.
    """
    return Session(model, *methods, rows=rows, seed=seed)


class _Room(ModuleType):
    """Lets `regard.attach(model, ...)` work although `regard.attach` is also a package."""

    def __call__(
        self, model: nn.Module, *methods: Method, rows: float | None = None, seed: int = 0
    ) -> Session:
        return attach(model, *methods, rows=rows, seed=seed)


sys.modules[__name__].__class__ = _Room

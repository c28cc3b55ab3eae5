"""Install a plan on a model: while it lasts, every text the model begins to read gets a planned cache."""

from __future__ import annotations

import os
import weakref
from typing import Any

from torch import nn

from regard._errors import InputError
from regard.attach.cache_names import NAMES, cache_argument
from regard.attach.hold import hold
from regard.plan.plan import Plan


class Applied:
    """A plan at work on a model; leave the `with` block or call `close()` to take it off.

    A call of the model (from `generate()` or on its own) that would use the cache and comes with none, or with an empty one of
    transformers' own, gets a planned cache instead. A cache that already holds something, or one of regard's, is left alone.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        plan.check(model)
        self.model, self.plan = model, plan
        self.argument = cache_argument(model)
        self._handle: Any = model.register_forward_pre_hook(
            self._calling, with_kwargs=True, prepend=True
        )
        # the hooks of a cache must be there before the call in which it is made
        self._release = weakref.finalize(self, hold(model))
        self._release.atexit = False

    def cache(self) -> Any:
        """An empty planned cache, to keep a hand on."""
        return self.plan._new(self.model)

    def close(self) -> None:
        """Takes the plan off the model; caches that exist go on working. Safe to call twice."""
        self._handle.remove()
        self._release()

    def __enter__(self) -> Applied:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _calling(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        if module is not self.model or module.training:
            return None
        name = next((n for n in NAMES if n in kwargs), self.argument)
        given = kwargs.get(name)
        uses = kwargs.get("use_cache")
        if uses is None:
            uses = getattr(getattr(module, "config", None), "use_cache", True)
        if not uses or not _is_empty(given):
            return None
        return args, {**kwargs, name: self.plan._new(self.model), "use_cache": True}


def apply(model: nn.Module, plan: Any) -> Applied:
    """Uses a plan on a model: `with regard.apply(model, "plan.json"): model.generate(...)`.

    Args:
        model: the model that the plan was made for.
        plan: a `Plan`, or the path of its JSON file.

    Returns:
        an `Applied`, at work already; its `with` block takes the plan off again.

    Raises:
        InputError: not a plan, or one that was made for another model.
    """
    if isinstance(plan, (str, os.PathLike)):
        plan = Plan.load(plan)
    if not isinstance(plan, Plan):
        raise InputError.of("plan", given=plan, expected="a regard.plan.Plan or the path of one")
    return Applied(model, plan)


def _is_empty(cache: Any) -> bool:
    """No cache, or one that transformers made and nothing has been written to."""
    if cache is None:
        return True
    return type(cache).__module__.startswith("transformers.") and cache.get_seq_length() == 0

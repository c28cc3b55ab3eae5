"""Attention dynamics in transformers: see where attention goes, change it, measure the difference.

Every name below is imported on first use, so that `import regard` stays cheap::

    model = regard.load("smollm2")  # the embedded model, a directory, a .gguf file or a hub id
    result = regard.observe(model, text)  # every instrument over one text
    heads = regard.retrieval_heads(model)  # the needle task
    regard.report(model, text)  # all of it as one HTML page

    with regard.ablate(model, heads=["L5H3"]):  # the model without one head
        ...
    with regard.attach(model, *methods) as session:  # your own methods
        ...

    cache = regard.cache.SnapKV(model, budget=0.2)  # a smaller KV cache
    results = regard.bench(model)  # what each cache saves and what it costs
    with regard.apply(model, "plan.json"):  # the setting that `regard bench --plan` found
        ...
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.attach import attach as attach
    from regard.bench import bench as bench
    from regard.instruments import observe as observe
    from regard.instruments.retrieval import retrieval_heads as retrieval_heads
    from regard.interventions import ablate as ablate
    from regard.plan import apply as apply
    from regard.pretrained import load as load
    from regard.report import report as report

__version__ = "0.1.0"

_EXPORTS = {
    "load": "regard.pretrained",
    "observe": "regard.instruments",
    "retrieval_heads": "regard.instruments.retrieval",
    "ablate": "regard.interventions",
    "apply": "regard.plan",
}
# `attach`, `report` and `bench` are packages that can be called, so the name is the room itself.
_ROOMS = (
    "attach",
    "report",
    "bench",
    "cache",
    "coordinates",
    "engine",
    "instruments",
    "interventions",
    "labs",
    "metrics",
    "models",
    "nn",
    "ops",
    "papers",
    "plan",
    "pretrained",
    "sparse",
    "texts",
    "weights",
)

__all__ = [
    "ablate",
    "apply",
    "attach",
    "bench",
    "load",
    "observe",
    "report",
    "retrieval_heads",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(import_module(_EXPORTS[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:
        return import_module(f"regard.{name}")
    raise AttributeError(
        f"module 'regard' has no attribute {name!r}; it offers {', '.join(__all__)}"
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})

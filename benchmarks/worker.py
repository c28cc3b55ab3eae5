"""One measurement in a process of its own: `python -m benchmarks.worker JSON` prints a JSON line.

Memory is the highest resident size during one pass minus the resident size just before it; Linux's own peak counter is
reset in between. Times are wall seconds; several methods in one worker run in turns (A B C A B C ...), so that a change of
the machine's speed meets all of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def memory(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"/proc/self/status has no {field}")


def extra_memory(run: Any) -> float:
    """Peak resident MB during `run()` above what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def tokens(path: str, count: int) -> torch.Tensor:
    """The first `count` tokens of the built-in prose, once more from the start where it is too short."""
    ids = torch.tensor(json.loads((Path(path) / "bench-tokens.json").read_text()))
    return ids.repeat(-(-count // len(ids)))[:count][None]


def tiny(path: str) -> Any:
    """Four random layers with SmolLM2's head layout, for lengths that the whole model would take minutes for."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(path)
    config.num_hidden_layers, config.max_position_embeddings = 4, 65536
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def main() -> None:
    task = json.loads(sys.argv[1])
    from benchmarks.methods import METHODS, prepare

    torch.set_num_threads(task["threads"])
    torch.set_grad_enabled(False)
    names = task["methods"]
    model = tiny(task["path"]) if task.get("tiny") else prepare(names[0], task["path"])
    ids = tokens(task["path"], task["length"])
    for name in names:
        METHODS[name](model, ids[:, :64])
    result: dict[str, Any] = {"seconds": {name: [] for name in names}, "memory_mb": {}}
    if task["kind"] == "memory":
        result["memory_mb"][names[0]] = extra_memory(lambda: METHODS[names[0]](model, ids))
    elif task["kind"] == "generate":
        result["seconds"] = generate(model, ids, task["rounds"])
    else:
        for _ in range(task["rounds"]):
            for name in names:
                start = time.perf_counter()
                METHODS[name](model, ids)
                result["seconds"][name].append(time.perf_counter() - start)
    print("RESULT " + json.dumps(result))


def generate(model: Any, ids: torch.Tensor, rounds: int, new: int = 48) -> dict[str, list[float]]:
    """Seconds for `new` greedy tokens, plain and with row statistics of every step."""
    import regard
    from regard.instruments import Distance, Entropy, SinkMass

    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    found: dict[str, list[float]] = {"generate": [], "generate_observed": []}
    for _ in range(rounds):
        start = time.perf_counter()
        model.generate(ids, **settings)
        found["generate"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with regard.attach(model, Entropy(), Distance(), SinkMass()):
            model.generate(ids, **settings)
        found["generate_observed"].append(time.perf_counter() - start)
    return found


if __name__ == "__main__":
    main()

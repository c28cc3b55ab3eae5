"""`python -m benchmarks.peer_kvpress --peer-python PYTHON`: the same documents and needles under kvpress.

PYTHON names an interpreter that has kvpress with the transformers it supports. The exams are those of `benchmarks.quality_gap`,
handed over as token ids; a worker in the other interpreter prefills each under each press with 80 % removed, and asks. Prefill
and decoding times are CPU time of one thread beside transformers' own cache in the same process; bytes are those of the tensors
that the cache holds afterwards. Writes results/kvpress.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "results" / "kvpress.json"
BUDGET, DECODED = 0.2, 16


def presses() -> dict[str, Any]:
    import kvpress

    removed = 1 - BUDGET
    return {
        "streaming": lambda: kvpress.StreamingLLMPress(removed),
        "snapkv 64": lambda: kvpress.SnapKVPress(removed, window_size=64),
        "expected": lambda: kvpress.ExpectedAttentionPress(removed),
        "snapkv 64 by head": lambda: kvpress.AdaKVPress(
            kvpress.SnapKVPress(removed, window_size=64)
        ),
        "h2o": lambda: kvpress.ObservedAttentionPress(removed),
        "kvzip": lambda: kvpress.KVzipPress(removed),
    }


def held_bytes(cache: Any) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


class Examiner:
    """One model of the peer's transformers, and what is asked of it."""

    def __init__(self, path: str, attention: str = "sdpa") -> None:
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation=attention
        ).eval()

    def fresh(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def prefill(self, ids: Any, press: Any = None) -> tuple[Any, float]:
        """The cache after a prefill and its CPU seconds; logits of the last token only."""
        from contextlib import nullcontext

        cache = self.fresh()
        start = time.process_time()
        with press(self.model) if press is not None else nullcontext():
            self.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return cache, time.process_time() - start

    def read(self, cache: Any, tokens: list[int], position: int, keep: int) -> Any:
        import torch

        ids = torch.tensor([tokens])
        positions = torch.arange(position, position + len(tokens))[None]
        output = self.model(
            input_ids=ids, position_ids=positions, past_key_values=cache, logits_to_keep=keep
        )
        return output.logits[0]

    def answer(self, cache: Any, question: dict[str, Any], position: int) -> float:
        """Log-probability of an answer token; the cache is as it was afterwards."""
        import torch

        tokens, keep = question["prompt"] + question["answer"], len(question["answer"])
        before = [(layer.keys, layer.values) for layer in cache.layers]
        # whatever writes into the held keys (masks made of keys do) writes into a copy
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        logits = self.read(cache, tokens, position, keep + 1)[:-1]
        for layer, (keys, values) in zip(cache.layers, before, strict=True):
            layer.keys, layer.values = keys, values
        wanted = torch.tensor(question["answer"])
        return float(logits.log_softmax(-1).gather(-1, wanted[:, None]).mean())

    def decode(self, cache: Any, position: int) -> float:
        """CPU seconds a token of plain decoding on top of a copy."""
        own = copy.deepcopy(cache)
        self.read(own, [5], position, 1)
        start = time.process_time()
        for step in range(DECODED):
            self.read(own, [5 + step], position + 1 + step, 1)
        return (time.process_time() - start) / DECODED


def work(task: Path) -> None:
    """In the peer's interpreter: one JSON line for each document and method."""
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    given = json.loads(task.read_text())
    fused, maps = Examiner(given["path"]), Examiner(given["path"], "eager")
    for exam in given["exams"]:
        ids = torch.tensor([exam["context"]])
        plain, base = fused.prefill(ids)
        stepping = fused.decode(plain, ids.shape[1])
        asked = {"full": (None, fused)}
        for name, make in presses().items():
            asked[name] = (make, maps if name == "h2o" else fused)
        for name, (make, examiner) in asked.items():
            row: dict[str, Any] = {"document": exam["name"], "method": name}
            try:
                cache, seconds = (plain, base) if make is None else examiner.prefill(ids, make())
                row |= {
                    "needle": statistics.mean(
                        examiner.answer(cache, question, ids.shape[1])
                        for question in exam["questions"]
                    ),
                    "bytes": held_bytes(cache) / held_bytes(plain),
                    "prefill": seconds / base,
                    "decode": 1.0
                    if make is None
                    else examiner.decode(cache, ids.shape[1]) / stepping,
                }
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            print("ROW " + json.dumps(row), flush=True)


def versions(python: str) -> dict[str, str]:
    names = ("kvpress", "transformers", "torch")
    code = f"import importlib.metadata as m; print(*[m.version(n) for n in {names}])"
    told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    return dict(zip(names, told.split(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_kvpress", description=__doc__)
    parser.add_argument("--peer-python", help="an interpreter with kvpress")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(given.work)
        return
    if given.peer_python is None:
        parser.error("--peer-python is needed")

    import tempfile

    import regard
    from benchmarks.quality_gap import exams

    model: Any = regard.load("smollm2")
    handed = [
        {
            "name": exam.name,
            "context": exam.context.tolist(),
            "questions": [
                {"prompt": list(q.prompt), "answer": list(q.answer)}
                for q in exam.questions
                if q.measure == "needle"
            ],
        }
        for exam in exams(model.tokenizer)
    ]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        task = Path(scratch) / "task.json"
        task.write_text(json.dumps({"path": model.config._name_or_path, "exams": handed}))
        command = [given.peer_python, "-m", "benchmarks.peer_kvpress", "--work", str(task)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parent)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ROW "):
                rows.append(json.loads(line[4:]))
                print(line[4:], end="", flush=True)
        if process.wait():
            sys.exit(f"the worker ended with code {process.returncode}")
    scratch_file = OUT.with_suffix(".tmp")
    found = {"budget": BUDGET, "versions": versions(given.peer_python), "rows": rows}
    scratch_file.write_text(json.dumps(found, indent=1) + "\n")
    scratch_file.replace(OUT)


if __name__ == "__main__":
    main()

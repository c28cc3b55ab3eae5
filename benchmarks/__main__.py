"""`python -m benchmarks`: measure, write benchmarks/results/observe.json, draw docs/benchmarks.md.

Every figure is taken beside the plain forward pass of the same model on the same text in the same run. Peers are measured
when `--peer-python` names an interpreter that has them (transformer-lens, nnsight).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
CAP_MB = 14_000


def worker(python: str, **task: Any) -> dict[str, Any]:
    """Runs one worker; a failure is recorded with its last line."""
    command = [python, "-m", "benchmarks.worker", json.dumps(task)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=HERE.parent, timeout=900, check=False
        )
    except subprocess.TimeoutExpired:
        return {"failed": "took more than 15 minutes"}
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    last = [line for line in done.stderr.strip().splitlines() if line.strip()] or ["no output"]
    return {"failed": last[-1][:200]}


def memory(python: str, name: str, length: int, **common: Any) -> dict[str, Any]:
    """Extra peak memory, the median of three processes: what the allocator can use again differs from one to the next."""
    found: list[float] = []
    for _ in range(3 if name in ("plain", "exact", "sampled") else 1):
        held = worker(python, kind="memory", methods=[name], length=length, rounds=1, **common)
        if "failed" in held:
            return {"failed": held["failed"]}
        found.append(held["memory_mb"][name])
    return {
        "memory_mb": statistics.median(found),
        "memory_low": min(found),
        "memory_high": max(found),
    }


def map_megabytes(length: int, layers: int = 30, heads: int = 9) -> float:
    """What the full maps of all layers take in fp32."""
    return layers * heads * length * length * 4 / 1e6


def model_directory() -> str:
    """The embedded model's directory in the cache, with the benchmark's tokens beside it."""
    import regard
    from regard.texts import prose

    model = regard.load("smollm2")
    path = Path(model.config._name_or_path)
    text = prose(60_000)
    ids = model.tokenizer(text, verbose=False)["input_ids"]
    (path / "bench-tokens.json").write_text(json.dumps(ids))
    return str(path)


def setting(threads: int) -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    import torch
    import transformers

    return {
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": threads,
        },
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--peer-python", help="an interpreter with transformer-lens and nnsight")
    parser.add_argument("--peer-lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "observe.json")
    parser.add_argument(
        "--keep", action="store_true", help="keep what the file has of other lengths and methods"
    )
    given = parser.parse_args()
    path, ours = model_directory(), sys.executable
    common = {"path": path, "threads": given.threads}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    about = setting(given.threads)
    rows: list[dict[str, Any]] = []
    if given.keep and given.out.is_file():
        rows = json.loads(given.out.read_text())["rows"]

    def note(row: dict[str, Any]) -> None:
        """Puts a row in the place of an older one and writes the file, so that a stop loses nothing."""
        same = ("length", "method")
        before = [old for old in rows if all(old[key] == row[key] for key in same)]
        rows[:] = [old for old in rows if old not in before]
        measured = [old for old in before if "failed" not in old]
        rows.extend(measured if measured and "failed" in row else [row])
        rows.sort(key=lambda one: one["length"])
        scratch = given.out.with_suffix(".tmp")
        scratch.write_text(json.dumps({**about, "rounds": given.rounds, "rows": rows}, indent=1))
        scratch.replace(given.out)
        print(json.dumps(row), flush=True)

    for length in given.lengths:
        rounds = given.rounds if length < 8192 else max(2, given.rounds - 1)
        names = ["plain", "attached", "exact", "sampled"]
        if map_megabytes(length) < CAP_MB:
            names.append("eager")
        found = worker(ours, kind="time", methods=names, length=length, rounds=rounds, **common)
        if "failed" in found:
            note({"length": length, "method": "all", **found})
            continue
        base = found["seconds"]["plain"]
        for name in names:
            pairs = [a / b for a, b in zip(found["seconds"][name], base, strict=True)]
            note(
                {
                    "length": length,
                    "method": name,
                    "seconds": statistics.median(found["seconds"][name]),
                    "ratio": statistics.median(pairs),
                    "ratio_low": min(pairs),
                    "ratio_high": max(pairs),
                    **({} if name == "attached" else memory(ours, name, length, **common)),
                }
            )
        peers = ("transformer_lens", "nnsight") if given.peer_python else ()
        for peer in peers if length in given.peer_lengths else ():
            if map_megabytes(length) >= CAP_MB:
                need = map_megabytes(length) / 1000
                note(
                    {
                        "length": length,
                        "method": peer,
                        "failed": f"not run: the maps alone take {need:.1f} GB",
                    }
                )
                continue
            timed = worker(
                given.peer_python, kind="time", methods=[peer], length=length, rounds=2, **common
            )
            held = worker(
                given.peer_python, kind="memory", methods=[peer], length=length, rounds=1, **common
            )
            row: dict[str, Any] = {"length": length, "method": peer}
            if "failed" in timed:
                row["failed"] = timed["failed"]
            else:
                seconds = statistics.median(timed["seconds"][peer])
                row |= {"seconds": seconds, "ratio": seconds / statistics.median(base)}
                row["memory_mb"] = held.get("memory_mb", {}).get(peer)
            note(row)
    long = worker(
        ours, kind="memory", methods=["exact"], length=32768, rounds=1, tiny=True, **common
    )
    note(
        {
            "length": 32768,
            "method": "exact, 4 random layers",
            "memory_mb": long.get("memory_mb", {}).get("exact"),
            **({"failed": long["failed"]} if "failed" in long else {}),
        }
    )
    spoken = worker(
        ours, kind="generate", methods=["plain"], length=512, rounds=given.rounds + 2, **common
    )
    if "failed" in spoken:
        note({"length": 512, "method": "generate", **spoken})
    else:
        pairs = [b / a for a, b in zip(*spoken["seconds"].values(), strict=True)]
        note(
            {
                "length": 512,
                "method": "generate",
                "ratio": statistics.median(pairs),
                "ratio_low": min(pairs),
                "ratio_high": max(pairs),
                "seconds": statistics.median(spoken["seconds"]["generate"]),
            }
        )
    from benchmarks.page import write

    write(given.out)


if __name__ == "__main__":
    main()

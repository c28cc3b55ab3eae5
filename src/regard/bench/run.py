"""A bench: every method at every budget, on the same prefill of the same documents.

For each document: one prefill with the full cache; each scorer watches a replay of it once; each budget is a compressed branch,
graded on the text that follows and on the questions. For the first document, real prefills and decoding steps are timed.
Finished cells are kept (`regard.bench.store`), so an interrupted bench goes on where it stopped.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from regard._errors import InputError
from regard._progress import progress
from regard.attach.cache_names import cache_argument
from regard.bench.documents import CONTINUATION, Document, builtin_documents, text_documents
from regard.bench.exam import SHORTEST, make_exam
from regard.bench.grader import Grader
from regard.bench.replay import Prefill
from regard.bench.results import FULL, LIBRARY, Results, Row
from regard.bench.store import Store
from regard.cache.budget import check_size
from regard.cache.calibration import Calibration, calibrate
from regard.plan import Named, fingerprint
from regard.plan.methods import Size
from regard.plan.plan import calibration_of
from regard.pretrained import load, provenance, tokenizer_of

METHODS = (
    "streaming", "keynorm", "tova", "snapkv", "snapkv+pyramid", "snapkv+ada", "cake", "h2o", "expected",
    "expected+global", "h2o+calibrated", "expected+calibrated", "kvzip",
)  # fmt: skip
BUDGETS: tuple[Size, ...] = (0.1, 0.2, 0.5)


class Bench:
    """A bench that can be stopped and gone on with.

    Args:
        model: a model, or a name or path that `regard.load` takes.
        text: what to read; None takes English, code and licence texts that come with Python and its packages.
        methods: `scorer` or `scorer+rule` (`regard.plan.SCORERS`, `regard.plan.RULES`).
        budgets: fractions, tokens per KV head, or bytes such as "64MB".
        lengths: tokens of context, facts to find included.
        documents: how many; intervals are over them.
        calibration: for calibrated budgets; None makes one from built-in texts that are not among the documents.
        tokenizer: when it is not the model's own.
        seed: of what is planted where.
        keep: file that finished cells go to.
        timed: whether prefill and decoding are timed as well.
        command: the command line, for the page.

    Raises:
        InputError: before any work, for anything that cannot be measured.

    Cost: per document a prefill (with the queries of all layers in memory), a watching per scorer, and per setting about 20
    questions; the defaults take about 13 CPU minutes with SmolLM2-135M.
    """

    def __init__(
        self,
        model: Any = "smollm2",
        text: str | None = None,
        *,
        methods: Sequence[str] = METHODS,
        budgets: Sequence[Size] = BUDGETS,
        lengths: Sequence[int] = (2048,),
        documents: int = 3,
        calibration: Calibration | None = None,
        tokenizer: Any = None,
        seed: int = 0,
        keep: Path | None = None,
        timed: bool = True,
        command: str = "",
    ) -> None:
        self.methods = list(dict.fromkeys(Named.parse(name) for name in methods))
        self.budgets = list(dict.fromkeys(budgets))
        self.lengths = sorted(dict.fromkeys(lengths))
        if not (self.methods and self.budgets and self.lengths):
            raise InputError("a bench needs at least one method, one budget and one length")
        for size in self.budgets:
            check_size(size)
        if documents < 1:
            raise InputError.of("documents", given=documents, expected="at least 1")
        for length in self.lengths:
            if length < SHORTEST:
                raise InputError.of("lengths", given=length, expected=f"at least {SHORTEST} tokens")
            for size in self.budgets:
                if isinstance(size, int) and size > length:
                    raise InputError(
                        f"a budget of {size} tokens is more than the context of {length} holds; "
                        "give a smaller one, or longer --lengths"
                    )
        self.model = load(model)
        cache_argument(self.model)
        if getattr(self.model, "get_output_embeddings", lambda: None)() is None:
            raise InputError(
                f"a bench needs a causal language model with a KV cache, got {type(self.model).__name__}"
            )
        self.tokenizer = tokenizer_of(self.model, tokenizer)
        self.seed, self.timed, self.text, self.command = seed, timed, text, command
        self.documents: dict[int, list[Document]] = {
            length: self._documents(length, documents) for length in self.lengths
        }
        self.calibration = calibration
        print_of = fingerprint(self.model)
        import transformers

        purpose = {
            "model": print_of, "text": _digest(self.documents), "seed": seed, "timed": timed,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__, "transformers": transformers.__version__,
            "calibration": None if calibration is None else calibration.fingerprint,
        }  # fmt: skip
        self.store = Store(keep, purpose)
        self.seconds = 0.0

    def _documents(self, length: int, count: int) -> list[Document]:
        if self.text is not None:
            return text_documents(self.tokenizer, self.text, length, count)
        return builtin_documents(self.tokenizer, length, each=-(-count // 3))[:count]

    # cells

    def cells(self) -> list[str]:
        """The names of everything to be measured."""
        names = []
        for length, documents in self.documents.items():
            settings = [
                (FULL, "1"),
                *((str(m), str(b)) for m in self.methods for b in self.budgets),
            ]
            names += [f"{length}/{d.name}/{m}/{b}" for d in documents for m, b in settings]
            if self.timed:
                timed = [(LIBRARY, "1"), *settings]
                names += [f"{length}/{documents[0].name}/{m}/{b}/time" for m, b in timed]
        return names

    def run(self) -> Results:
        """Measures what has not been measured yet, and returns everything. Ctrl-C keeps what is finished."""
        names = self.cells()
        start = time.perf_counter()
        try:
            with progress(len(names), "Measuring caches") as advance:
                advance(sum(name in self.store for name in names))
                if any(name not in self.store for name in names):
                    for length, documents in self.documents.items():
                        for number, document in enumerate(documents):
                            self._document(length, document, self.timed and number == 0, advance)
        finally:
            self.seconds += time.perf_counter() - start
        return self.results()

    def _document(
        self, length: int, document: Document, timed: bool, advance: Callable[..., None]
    ) -> None:
        place = f"{length}/{document.name}"
        if all(n in self.store for n in self.cells() if n.startswith(f"{place}/")):
            return
        exam = make_exam(self.tokenizer, document, length, self.seed)
        prefill = Prefill(self.model, exam.context)
        try:
            grade = Grader(self.model, self.tokenizer, self.store, exam, prefill, advance)
            grade.baselines(timed)
            for scorer in dict.fromkeys(method.scorer for method in self.methods):
                own = [method for method in self.methods if method.scorer == scorer]
                grade.scorer(own, self.budgets, self.calibrated, timed)
        finally:
            prefill.close()

    def calibrated(self) -> Calibration:
        """The calibration for this model, made once from texts that are not among the documents."""
        if self.calibration is None:
            kept = self.store.get("calibration", lambda: asdict(self._calibrate()))
            self.calibration = calibration_of(kept)
        return self.calibration

    def _calibrate(self) -> Calibration:
        length, some = max(self.documents.items())
        read = 0 if self.text is not None else -(-len(some) // 3) * (length + CONTINUATION)
        skip = -(-read // (1024 + CONTINUATION))
        apart = builtin_documents(self.tokenizer, 1024, each=1, skip=skip)
        texts = [self.tokenizer.decode(document.ids[:1024]) for document in apart]
        return calibrate(self.model, texts, tokenizer=self.tokenizer)

    def calibration_used(self) -> Calibration | None:
        """The calibration of the calibrated settings; None when there were none."""
        return self.calibrated() if "calibration" in self.store or self.calibration else None

    # results

    def results(self) -> Results:
        """Everything measured so far."""
        found = Results()
        names = self.cells()
        for name in (name for name in names if name in self.store):
            cell = self.store.cells[name]
            found.rows += [Row(*row) for row in cell["rows"]]
            if "text" in cell:
                found.texts.append(cell["text"])
        found.complete = all(name in self.store for name in names)
        found.about = self._about()
        return found

    def _about(self) -> dict[str, Any]:
        import transformers

        import regard

        facts = provenance(self.model, self.tokenizer, digest=False)
        entries = {
            LIBRARY: {
                "title": "DynamicCache",
                "source": "the cache that transformers makes by default",
            },
            FULL: {"title": "Full cache", "source": "regard.cache.Full: drops nothing"},
            **{str(m): {"title": m.title, "source": m.source} for m in self.methods},
        }
        return {
            "model": str(facts["name"]),
            "architecture": facts["model_class"],
            "parameters": facts["parameters"],
            "quantisation": facts["quantisation"],
            "dtype": str(facts["dtype"]).removeprefix("torch."),
            "documents": ", ".join(d.name for d in self.documents[self.lengths[0]]),
            "command": self.command,
            "seed": self.seed,
            "bandwidth": self.store.cells.get("bandwidth"),
            "threads": torch.get_num_threads(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs, {sys.platform}",
            "seconds": round(self.seconds, 1),
            "date": date.today().isoformat(),
            "versions": {"regard": regard.__version__, "torch": torch.__version__,
                         "transformers": transformers.__version__, "python": platform.python_version()},
            "methods": entries,
        }  # fmt: skip


def bench(model: Any = "smollm2", text: str | None = None, **options: Any) -> Results:
    """Measures what each cache method saves and costs on a model and a text; see `Bench` for all options.

    >>> results = regard.bench("smollm2", methods=["h2o", "snapkv"], budgets=[0.2])  # doctest: +SKIP
    >>> results.lost(results.settings()[-1], "needle")  # doctest: +SKIP
    """
    return Bench(model, text, **options).run()


def _digest(documents: dict[int, list[Document]]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for length, some in documents.items():
        for document in some:
            digest.update(f"{length} {document.name} {document.ids}".encode())
    return digest.hexdigest()[:16]

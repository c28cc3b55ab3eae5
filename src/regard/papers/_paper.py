"""What a paper file declares: a `Paper` and its `Claim`s, before anything is measured."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from regard._errors import EvidenceError, InputError
from regard.papers._catalogue import Entry, entry


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper that a measurement can support or contradict.

    Attributes:
        id: short name, used by `Run.record`; unique within the paper.
        claim: the sentence, in our words, naming the quantity that is measured.
        setting: where the paper says so (models, data, size).
        paper: the paper's number as printed, with its unit; "" when it gives none.
        unit: unit of the number measured here, for display only ("%", "x", " nats").
        expect: when the claim counts as held here, in words ("below 15 % of heads").
        holds: the same as a predicate on the measured value; it may return None for "cannot say".
            Leave it out when the verdict needs more than one number, and compute `holds=` in
            `Run.record` instead.
        beyond: why this claim cannot be checked at our scale. It is then written down as not
            shown, and needs no record.
    """

    id: str
    claim: str
    setting: str
    paper: str = ""
    unit: str = ""
    expect: str = ""
    holds: Callable[[Any], object] | None = None
    beyond: str = ""


@dataclass(frozen=True)
class Paper:
    """A paper of the catalogue together with the claims that its experiment checks.

    Attributes:
        slug: its name in the catalogue; title, arXiv number and date come from there.
        claims: what is checked, in the order of the evidence table.
        needs: modules beyond the core dependencies that the experiment imports
            (`("sklearn", "matplotlib")`), looked for before any work begins.
    """

    slug: str
    claims: Sequence[Claim]
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        entry(self.slug)
        ids = [claim.id for claim in self.claims]
        if not ids:
            raise EvidenceError(f"paper {self.slug} must state at least one claim, got none")
        twice = sorted({name for name in ids if ids.count(name) > 1})
        if twice:
            raise EvidenceError(
                f"claim ids of {self.slug} must be unique, got {', '.join(twice)} more than once"
            )

    @property
    def entry(self) -> Entry:
        """Title, arXiv number, date and description, from the catalogue."""
        return entry(self.slug)

    def claim(self, claim_id: str) -> Claim:
        """The claim of that id, or an error that lists the ids there are."""
        for claim in self.claims:
            if claim.id == claim_id:
                return claim
        ids = ", ".join(claim.id for claim in self.claims)
        raise EvidenceError(f"claim id of {self.slug} must be one of {ids}; got {claim_id!r}")

    def check_needs(self) -> None:
        """Raise `InputError` with the install command when a needed module is absent."""
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(
                f"{self.slug} needs the module(s) {', '.join(missing)}, which are not installed; "
                "pip install 'regard[experiments,plot,frames,train]'"
            )

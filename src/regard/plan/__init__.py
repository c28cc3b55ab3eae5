"""Plans: how one model's cache is to be kept, found by `regard bench`, installed by `regard.apply`."""

from regard.plan.applied import Applied, apply
from regard.plan.fingerprint import fingerprint
from regard.plan.methods import RULES, SCORERS, Named
from regard.plan.plan import Plan

__all__ = ["RULES", "SCORERS", "Applied", "Named", "Plan", "apply", "fingerprint"]

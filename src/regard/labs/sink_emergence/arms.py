"""The arms of the study: the default run, and what differs from it in each of the others, one factor at a time."""

from __future__ import annotations

from dataclasses import dataclass

FACTORS = ("optimiser", "data", "loss", "attention", "bias")
"""What is varied, one at a time."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One training setting.

    Attributes:
        name: as shown in pictures.
        factor: which factor it varies; "" for the default run.
        rate: learning rate over the default's.
        decay: weight decay; None for the default's.
        share: share of the training text that is used.
        fixed: position (from 1) where each sequence carries one token that occurs nowhere else; 0 for none.
        random: so many first tokens are uniformly random.
        prefix: so many first tokens see each other, and only what follows them is predicted; 0 for a causal model.
        window: keys that a query sees, itself included; 0 for all.
        attention: a name of `attention.OPERATIONS`.
        bias: "none"; "token", a learnt input before the sequence; "kv", a learnt key and value in each head; "k", a learnt key
            with a fixed value; "v", a learnt vector added to each head's output.
        carried: norm of that fixed value.
        turned: rotary positions; without, no positions at all.
    """

    name: str
    factor: str = ""
    rate: float | int = 1.0
    decay: float | int | None = None
    share: float | int = 1.0
    fixed: int = 0
    random: int = 0
    prefix: int = 0
    window: int = 0
    attention: str = "softmax"
    bias: str = "none"
    carried: float | int = 0.0
    turned: bool = True

    @property
    def architecture(self) -> tuple[str, str]:
        """Arms of one architecture train at once."""
        return self.attention, self.bias

    @property
    def sink(self) -> int:
        """Where the paper finds the sink: a position from 1, or 0 for the learnt key itself."""
        if self.bias in ("token", "kv", "k") and not self.carried:
            return 0
        return self.fixed or (2 if self.random == 2 else 1)


ARMS: tuple[Arm, ...] = (
    Arm("default"),
    Arm("rate x 2", "optimiser", rate=2.0),
    Arm("rate / 2", "optimiser", rate=0.5),
    Arm("rate / 4", "optimiser", rate=0.25),
    Arm("decay 0", "optimiser", decay=0.0),
    Arm("decay 0.5", "optimiser", decay=0.5),
    Arm("decay 5", "optimiser", decay=5.0),
    Arm("little text", "data", share=1 / 64),
    Arm("first token random", "data", random=1),
    Arm("first two random", "data", random=2),
    Arm("fixed token 1st", "data", fixed=1),
    Arm("fixed token 2nd", "data", fixed=2),
    Arm("fixed token 3rd", "data", fixed=3),
    Arm("prefix of 5", "loss", prefix=5),
    Arm("window of 16", "loss", window=16),
    Arm("no positions", "attention", turned=False),
    Arm("sigmoid", "attention", attention="sigmoid"),
    Arm("sigmoid, normalised", "attention", attention="sigmoid-normalised"),
    Arm("ELU + 1", "attention", attention="elu1"),
    Arm("sink token", "bias", bias="token"),
    Arm("KV biases", "bias", bias="kv"),
    Arm("K biases", "bias", bias="k"),
    Arm("K biases, value of norm 20", "bias", bias="k", carried=20),
    Arm("V biases", "bias", bias="v"),
)
"""The default run first, then one arm for each variation."""


def arms_of(factors: tuple[str, ...]) -> tuple[Arm, ...]:
    """The default run and the arms that vary these factors.

    >>> [arm.name for arm in arms_of(("loss",))]
    ['default', 'prefix of 5', 'window of 16']
    """
    return tuple(arm for arm in ARMS if not arm.factor or arm.factor in factors)

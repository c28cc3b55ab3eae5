"""`import regard` is cheap, and every public name is really there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import regard

VERBS = ["load", "observe", "ablate", "retrieval_heads", "attach", "report"]


def loaded_after(statement: str) -> set[str]:
    """The modules a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_pulls_in_nothing_heavy():
    loaded = loaded_after("import regard")
    heavy = {"torch", "transformers", "polars", "matplotlib", "gguf", "rich", "typer", "scipy"}
    assert "regard" in loaded
    assert not loaded & heavy


def test_the_everyday_verbs_do_not_need_the_optional_extras():
    loaded = loaded_after(f"import regard; {[f'regard.{verb}' for verb in VERBS]}".replace("'", ""))
    assert {"torch", "regard.attach", "regard.instruments"} <= loaded
    assert not loaded & {"polars", "matplotlib", "sklearn", "scipy.stats"}


@pytest.mark.parametrize("name", regard.__all__)
def test_every_public_name_exists(name):
    assert getattr(regard, name) is not None
    assert name in dir(regard)


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_can_be_called_and_explains_itself(name):
    verb = getattr(regard, name)
    assert callable(verb)
    assert verb.__doc__


def test_a_submodule_import_does_not_hide_the_verb():
    loaded_after(
        "import regard.attach, regard.report, regard.attach.session\n"
        "import regard\n"
        "assert callable(regard.attach) and callable(regard.report)"
    )


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'atach'; it offers ablate, apply"):
        regard.atach  # noqa: B018

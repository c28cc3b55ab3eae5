"""`import regard` is cheap, and every public name is really there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import regard


def loaded_after(statement: str) -> set[str]:
    """The modules a fresh interpreter holds after `statement`."""
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_pulls_in_nothing_heavy():
    loaded = loaded_after("import regard")
    heavy = {"torch", "transformers", "polars", "matplotlib", "gguf", "rich", "typer", "scipy"}
    assert "regard" in loaded
    assert not loaded & heavy


@pytest.mark.parametrize("name", ["attach", "observe", "ablate", "retrieval_heads", "load"])
def test_the_everyday_verbs_do_not_need_the_optional_extras(name):
    loaded = loaded_after(f"import regard; regard.{name}")
    assert "torch" in loaded
    assert not loaded & {"polars", "matplotlib", "sklearn", "scipy.stats"}


@pytest.mark.parametrize("name", regard.__all__)
def test_every_public_name_exists(name):
    assert getattr(regard, name) is not None
    assert name in dir(regard)


@pytest.mark.parametrize(
    "name", ["attach", "observe", "ablate", "retrieval_heads", "report", "load"]
)
def test_every_verb_can_be_called_and_explains_itself(name):
    verb = getattr(regard, name)
    assert callable(verb)
    assert verb.__doc__


@pytest.mark.parametrize("first", ["import regard.attach", "import regard.report"])
def test_a_submodule_import_does_not_hide_the_verb(first):
    name = first.rpartition(".")[2]
    code = f"{first}\nimport regard\nassert callable(regard.{name}), type(regard.{name})"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match="no attribute 'atach'; it offers ablate, attach"):
        regard.atach  # noqa: B018

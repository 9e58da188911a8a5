"""One colour for each kind of action."""

from __future__ import annotations

from pipework.plan import Kind

# Okabe and Ito's palette: colour-blind readers can tell these apart, and dark labels stay legible on all of them.
KINDS = {
    Kind.FORWARD: ("forward", "#56b4e9"),
    Kind.BACKWARD: ("backward", "#e69f00"),
    Kind.INPUT_GRADIENT: ("input gradient", "#cc79a7"),
    Kind.WEIGHT_GRADIENT: ("weight gradient", "#009e73"),
}
"""What a kind is called, and its colour."""

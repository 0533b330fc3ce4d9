"""Every colour of the pages and of their figures, in a light and in a dark scheme.

On a page each is a variable of its style sheet, `--ink`, `--even`, `--effect-20`; a figure is drawn in the light ones,
and takes the variables in their place where it stands on a page.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LinearSegmentedColormap, to_hex


class Colour(NamedTuple):
    """One colour in both schemes, as `#rrggbb`."""

    light: str
    dark: str


PAGE = {
    "page": Colour("#fcfcfa", "#15181b"),
    "ink": Colour("#22262b", "#e4e6e8"),
    "soft": Colour("#5b636c", "#a0a7af"),
    "line": Colour("#dcdfe2", "#363b41"),
    "tint": Colour("#f0f1ef", "#1f2327"),
    "mark": Colour("#d9ecdf", "#1d4a35"),
    "warn": Colour("#8a5a00", "#e0b050"),
    "accent": Colour("#1f56a8", "#8ab8ff"),
    "faint": Colour("#868d95", "#80878f"),
}
"""Paper, words, and what frames them.  `faint` is the grid of a figure and the frame of a control."""

LINES = {
    "clean": Colour("#265afb", "#5f7fff"),
    "corrupt": Colour("#e8541a", "#ff8527"),
    "even": Colour("#8f72d0", "#b7b8ff"),
    "odd": Colour("#664326", "#c2d08e"),
    "all": Colour("#2c8987", "#4faa9d"),
}
"""Of lines and their markers: at least 3:1 against the page, and at least 30 apart (CIELAB) also under simulated
protanopia and deuteranopia (Machado et al. 2009)."""


class Scale(NamedTuple):
    """A scale of a heat map: its stops, from lowest to highest, and into how many levels it is cut."""

    light: Sequence[str]
    dark: Sequence[str]
    n_levels: int

    def level(self, share: float) -> int:
        """Of a value that lies that far from the lowest, 0, to the highest, 1."""
        return min(int(share * self.n_levels), self.n_levels - 1)

    def colormap(self, stops: Sequence[str] | None = None) -> LinearSegmentedColormap:
        """As matplotlib wants it, in the light scheme."""
        return LinearSegmentedColormap.from_list("headlapse", list(stops or self.light), N=self.n_levels)


SCALES = {
    "effect": Scale(
        ("#a3332a", "#e08b78", "#f5f4f1", "#7fa8dc", "#1f56a8"),
        ("#ff9480", "#a84a3e", "#23282e", "#3a66a8", "#8ab8ff"),
        41,
    ),
    "rate": Scale(("#f1f3f0", "#7fb8a0", "#1c6a4c"), ("#22272c", "#2f7a5c", "#7fdcb4"), 25),
}
"""`effect`: red away from the right answer, blue towards it.  `rate`: a share, from none to all."""

CELLS = {
    name: Colour(SCALES["effect"].light[stop], SCALES["effect"].dark[stop])
    for stop, name in enumerate(("away", "neutral", "towards"), start=1)
}
"""Ends and middle of the stage's scale, which `stage.js` mixes: the pale half of `effect`, on which ink is read."""

BLACK, WHITE = "#000000", "#ffffff"

WORDS = {
    "on-pale": Colour("#000002", "#ffffff"),
    "on-middle": Colour("#000001", "#000000"),
    "on-middling": Colour("#fffffe", "#ffffff"),
    "on-strong": Colour("#ffffff", "#000000"),
}
"""What is written on a level of a scale: black or white, in either scheme.  The light ones differ by a blue that nobody
sees, so that a figure's words can be told apart when they become variables; matplotlib leaves plain black out."""


@cache
def levels(scale: str) -> list[Colour]:
    """From the lowest to the highest; of an odd number of them the middle one is zero."""
    its = SCALES[scale]
    maps = [its.colormap(stops) for stops in (its.light, its.dark)]
    return [Colour(*(to_hex(scheme(level)) for scheme in maps)) for level in range(its.n_levels)]


def variables() -> dict[str, Colour]:
    """Every colour by the name of its variable, without the dashes."""
    shades = {f"{scale}-{at}": colour for scale in SCALES for at, colour in enumerate(levels(scale))}
    return PAGE | LINES | CELLS | shades | WORDS


def declared(colours: Mapping[str, Colour], scheme: int) -> str:
    """As variables of a style sheet, in the light scheme, 0, or the dark one, 1."""
    return "; ".join(f"--{name}: {colour[scheme]}" for name, colour in colours.items())


def words_on(scale: str, level: int) -> str:
    """The light colour of what is written on a level of a scale: what stands out more, in each scheme by itself."""
    chosen = tuple(readable_on(colour) for colour in levels(scale)[level])
    return next(colour.light for colour in WORDS.values() if (_plain(colour.light), colour.dark) == chosen)


def _plain(nearly: str) -> str:
    return BLACK if nearly < "#800000" else WHITE


def readable_on(colour: str) -> str:
    """Black or white, whichever has the higher contrast with a colour."""
    return max((BLACK, WHITE), key=lambda word: contrast(word, colour))


def contrast(one: str, other: str) -> float:
    """Of two colours: 1 for the same, 21 for black and white (WCAG 2.2)."""
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2): 0 for black, 1 for white."""
    return float(linear_rgb(colour) @ [0.2126, 0.7152, 0.0722])


def linear_rgb(colour: str) -> Float[np.ndarray, "3"]:
    """Light of each primary, 0 to 1."""
    rgb = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def with_variables(svg: str) -> str:
    """A figure whose colours are those of the page that it stands on, in whichever scheme that is shown."""
    names = {colour.light: f"var(--{name})" for name, colour in variables().items()} | {
        PAGE["ink"].light: "currentColor"
    }
    return re.sub(r"(?<=: )#[0-9a-f]{6}\b", lambda found: names.get(found[0], found[0]), svg)

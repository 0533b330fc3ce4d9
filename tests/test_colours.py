"""Laws of the colours: what they mark can be seen, and told apart, in the light scheme and in the dark one."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.colors import to_hex

from headlapse.engine.report.colours import (
    CELLS,
    LINES,
    PAGE,
    SCALES,
    WORDS,
    contrast,
    levels,
    linear_rgb,
    readable_on,
    variables,
    with_variables,
    words_on,
)

SCHEMES = pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])

VISION = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}
"""What an eye makes of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1)."""

XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB under D65 of linear RGB."""
    relative = XYZ @ np.clip(light, 0, 1) / [0.95047, 1, 1.08883]
    x, y, z = np.where(relative > 216 / 24389, np.cbrt(relative), (24389 / 27 * relative + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_contrast_is_that_of_wcag() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#777777") == 1
    assert contrast("#767676", "#ffffff") == contrast("#ffffff", "#767676") == pytest.approx(4.54, abs=0.005)


@SCHEMES
def test_words_stand_out_from_whatever_they_stand_on(scheme: int) -> None:
    for paper, words in {"page": ["ink", "soft", "warn", "accent"], "tint": ["ink", "soft"], "mark": ["ink"]}.items():
        for word in words:
            assert contrast(PAGE[word][scheme], PAGE[paper][scheme]) >= 4.5, f"{word} on {paper}"
    for cell in CELLS.values():
        assert contrast(PAGE["ink"][scheme], cell[scheme]) >= 4.5, cell


@SCHEMES
def test_lines_stand_out_from_the_page_and_from_each_other_for_every_eye(scheme: int) -> None:
    for name, colour in (LINES | {"faint": PAGE["faint"]}).items():
        assert contrast(colour[scheme], PAGE["page"][scheme]) >= 3, name
    for sight, (one, other) in itertools.product(VISION.values(), itertools.combinations(LINES, 2)):
        seen = [lab(sight @ linear_rgb(LINES[name][scheme])) for name in (one, other)]
        assert np.linalg.norm(seen[0] - seen[1]) >= 30, (one, other)


@SCHEMES
@pytest.mark.parametrize("scale", SCALES)
def test_numbers_on_a_map_can_be_read_on_every_level(scale: str, scheme: int) -> None:
    drawn = {colour.light: colour for colour in WORDS.values()}
    for at, colour in enumerate(levels(scale)):
        word = drawn[words_on(scale, at)][scheme]
        assert contrast(word, colour[scheme]) >= 4.5 and readable_on(colour[scheme])[:3] == word[:3], at


@SCHEMES
def test_zero_is_pale_and_the_ends_of_a_scale_are_not(scheme: int) -> None:
    page, ends = PAGE["page"][scheme], {"effect": (0, -1), "rate": (-1,)}
    assert contrast(levels("effect")[SCALES["effect"].n_levels // 2][scheme], page) < 1.25
    assert contrast(levels("rate")[0][scheme], page) < 1.25
    for scale, at in ends.items():
        assert all(contrast(levels(scale)[place][scheme], page) >= 4.5 for place in at)


def test_a_value_lies_on_the_level_that_matplotlib_draws() -> None:
    for name, scale in SCALES.items():
        colours = [colour.light for colour in levels(name)]
        for share in np.linspace(0, 1, 101):
            assert to_hex(scale.colormap()(share)) == colours[scale.level(share)]


def test_a_figure_on_a_page_has_no_colour_but_the_variables_of_the_page() -> None:
    lights: dict[str, str] = {}
    for colour in variables().values():
        assert lights.setdefault(colour.light, colour.dark) == colour.dark, "one light colour, one dark one"
    figure = "fill: {}; stroke: {}".format(LINES["odd"].light, PAGE["ink"].light)
    assert with_variables(figure) == "fill: var(--odd); stroke: currentColor"
    all_of_them = "; ".join(f"fill: {colour.light}" for colour in variables().values())
    assert not re.search("#[0-9a-f]{6}", with_variables(all_of_them))

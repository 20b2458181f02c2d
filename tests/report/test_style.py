"""Colors of the style sheet: contrast in light and dark mode, and distinguishability with color blindness."""

import itertools
import re

import numpy as np
import pytest

from slm_jax.report.escaping import STYLE, read_asset

# Simulation matrices of Machado, Oliveira & Fernandes 2009 at full severity, for linear RGB.
VISION = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
LMS += [[0.0883024619, 0.2817188376, 0.6299787005]]
LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
LAB += [[0.0259040371, 0.7827717662, -0.8086757660]]


def themes():
    """Return the colors of each theme in linear RGB, {theme: {name: color}}."""
    style = read_asset(STYLE)
    blocks = re.findall(r":root \{(.*?)\n *\}", style, re.DOTALL)
    result = []
    for block in blocks[:2]:
        colors = re.findall(r"--([\w-]+): #([0-9a-f]{6});", block)
        values = {name: np.array([int(code[i : i + 2], 16) for i in (0, 2, 4)]) / 255 for name, code in colors}
        result.append({k: np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4) for k, v in values.items()})
    assert result[0].keys() == result[1].keys()
    return dict(zip(("light", "dark"), result, strict=True))


def contrast(a, b):
    low, high = sorted(float(color @ [0.2126, 0.7152, 0.0722]) for color in (a, b))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible(theme):
    c = themes()[theme]
    backgrounds = ["page", "card", "sunken"]
    pairs = [(text, background) for text in ("ink", "muted", "accent", "good", "bad") for background in backgrounds]
    pairs += [("ink", f"tint-{i}") for i in range(1, 7)] + [("muted", "tint-5"), ("page", "ink")]
    pairs += [("on-accent", "accent"), ("ink", "warn-page"), ("warn", "warn-page")]
    too_low = {
        pair: round(contrast(c[pair[0]], c[pair[1]]), 2) for pair in pairs if contrast(c[pair[0]], c[pair[1]]) < 4.5
    }
    assert not too_low


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_are_visible_and_distinguishable(theme):
    c = themes()[theme]
    series = [c[f"series-{i}"] for i in range(1, 6)]
    assert min(contrast(color, c[background]) for color in series for background in ("page", "card")) >= 3
    for matrix in VISION.values():
        perceived = [
            np.array(LAB) @ np.cbrt(np.array(LMS) @ np.clip(np.array(matrix) @ color, 0, 1)) for color in series
        ]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(perceived, 2)) >= 0.1

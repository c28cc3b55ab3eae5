"""Colour scales of the page, computed in OKLab so that lightness runs evenly and monotonically.

A reader who sees no hue still reads the order from lightness. Each scale starts at the page's own
background (light or dark theme) and moves away from it, so that "nothing" looks like nothing. The
diverging scale runs from blue through the background to orange. All are written as CSS custom
properties: a cell names a level, the theme decides its colour.
"""

from __future__ import annotations

import math

LEVELS = 32
"""Levels of the sequential scale."""

SIDE = 12
"""Levels on each side of the diverging scale's centre."""

# stops of (lightness, chroma, hue in degrees) along each scale
_LIGHT = [
    (0.955, 0.010, 110.0),
    (0.87, 0.055, 165.0),
    (0.72, 0.095, 190.0),
    (0.55, 0.110, 235.0),
    (0.38, 0.120, 270.0),
    (0.23, 0.075, 290.0),
]
_DARK = [
    (0.245, 0.014, 262.0),
    (0.36, 0.095, 275.0),
    (0.50, 0.110, 245.0),
    (0.64, 0.100, 205.0),
    (0.79, 0.105, 165.0),
    (0.94, 0.110, 112.0),
]
_LIGHT_COLD, _LIGHT_WARM = (0.45, 0.130, 255.0), (0.52, 0.150, 45.0)
_DARK_COLD, _DARK_WARM = (0.72, 0.120, 240.0), (0.76, 0.140, 60.0)

Stop = tuple[float, float, float]


def oklab_hex(lightness: float, a: float, b: float) -> str:
    """The sRGB hex code of an OKLab colour, clipped to the gamut (Ottosson 2020)."""
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    return "#" + "".join(f"{_gamma(channel):02x}" for channel in linear)


def _gamma(channel: float) -> int:
    channel = min(max(channel, 0.0), 1.0)
    encoded = 12.92 * channel if channel <= 0.0031308 else 1.055 * channel ** (1 / 2.4) - 0.055
    return round(255 * encoded)


def _lab(stop: Stop) -> Stop:
    lightness, chroma, hue = stop
    return (
        lightness,
        chroma * math.cos(math.radians(hue)),
        chroma * math.sin(math.radians(hue)),
    )


def _mix(a: Stop, b: Stop, t: float) -> Stop:
    return (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t, a[2] + (b[2] - a[2]) * t)


def sequential(dark: bool, levels: int = LEVELS) -> list[str]:
    """`levels` hex colours from the background outwards, evenly spaced in lightness."""
    stops = [_lab(stop) for stop in (_DARK if dark else _LIGHT)]
    first, last = stops[0][0], stops[-1][0]
    colours = []
    for level in range(levels):
        target = first + (last - first) * level / (levels - 1)
        part = next(
            (i for i in range(len(stops) - 1) if (stops[i + 1][0] - target) * (last - first) >= 0),
            len(stops) - 2,
        )
        low, high = stops[part], stops[part + 1]
        colours.append(oklab_hex(*_mix(low, high, (target - low[0]) / (high[0] - low[0]))))
    return colours


def diverging(dark: bool, side: int = SIDE) -> list[str]:
    """`2 * side + 1` hex colours: blue (below zero), background, orange (above zero)."""
    centre = _lab((_DARK if dark else _LIGHT)[0])
    cold = _lab(_DARK_COLD if dark else _LIGHT_COLD)
    warm = _lab(_DARK_WARM if dark else _LIGHT_WARM)
    below = [oklab_hex(*_mix(centre, cold, k / side)) for k in range(side, 0, -1)]
    above = [oklab_hex(*_mix(centre, warm, k / side)) for k in range(1, side + 1)]
    return [*below, oklab_hex(*centre), *above]


def css_variables(dark: bool) -> str:
    """`--q0 … --q31` (sequential) and `--d0 … --d24` (diverging) as CSS declarations."""
    names = [f"--q{i}:{c}" for i, c in enumerate(sequential(dark))]
    names += [f"--d{i}:{c}" for i, c in enumerate(diverging(dark))]
    return ";".join(names)


def css_classes() -> str:
    """Rules that fill an SVG cell by its level: `.q7` and `.d7`."""
    rules = [f".q{i}{{fill:var(--q{i})}}" for i in range(LEVELS)]
    return "".join(rules + [f".d{i}{{fill:var(--d{i})}}" for i in range(2 * SIDE + 1)])

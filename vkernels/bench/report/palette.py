"""The report's colours, once: the page's style sheet and the PNGs are both made of this table."""

from __future__ import annotations

THEMES = ("light", "dark")

# name: (light, dark). Wins are blue and losses orange, which everyone tells apart; a second cue (side of the line,
# shape, hatch) stands beside every colour. c0 to c7 are for operations and rivals.
COLOURS = {
    "bg": ("#fbfbfa", "#141517"),
    "card": ("#ffffff", "#1c1e21"),
    "ink": ("#1b1c1e", "#eceded"),
    "soft": ("#5d6168", "#a0a4ab"),
    "line": ("#e4e4e1", "#2f3237"),
    "axis": ("#b4b7bc", "#5a5f67"),
    "ours": ("#1f77b4", "#58a6dd"),
    "rival": ("#a3a7ae", "#71767e"),
    "loss": ("#d9622b", "#f0925c"),
    "even": ("#8b8f96", "#8f949c"),
    "masked": ("#f3c9a8", "#7a4a2c"),
    "hatch": ("#c8642a", "#f0a878"),
    "text": ("#a9adb4", "#7b8087"),
    "c0": ("#1f77b4", "#58a6dd"),
    "c1": ("#e07a3f", "#ee9560"),
    "c2": ("#2a9d8f", "#4cc0b1"),
    "c3": ("#b5478c", "#d873b4"),
    "c4": ("#7b5ea7", "#a68bd1"),
    "c5": ("#b08a10", "#dcbc4c"),
    "c6": ("#4f8a2f", "#86bd66"),
    "c7": ("#8c564b", "#c99a8e"),
}
CYCLE = 8


def cycled(index: int) -> str:
    return f"c{index % CYCLE}"


def colour(name: str, theme: str) -> str:
    return COLOURS[name][THEMES.index(theme)]


def style() -> str:
    """The table as CSS: the system's theme unless the page's button chose one; light when printed."""
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in COLOURS.items()) for i in (0, 1))
    classes = "".join(f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in COLOURS)
    return (
        f":root{{color-scheme:light;{light}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root:not(.light){{color-scheme:dark;{dark}}}}}"
        f"@media screen{{:root.dark{{color-scheme:dark;{dark}}}}}{classes}"
    )

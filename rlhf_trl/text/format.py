"""Number formats of the report and the model card, and the addresses of values in a run's JSON files."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any


def resolve(documents: Mapping[str, Any], file: str, keys: Sequence[str | int]) -> Any:
    """Look a value up by its address: the file, and the keys that lead to it."""
    value = documents[file]
    for key in keys:
        value = value[key]
    return value


def pointer(file: str, keys: Sequence[str | int]) -> str:
    """Write an address: the file, and a JSON Pointer (RFC 6901) into it."""
    return f"{file}#" + "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


def format_estimate(estimate: Mapping[str, float | None], sign: str = "", percent: bool = False) -> str:
    """Print mean and interval to two digits of the interval's width; the mean alone where there is no spread. A limit
    that is null is infinite. `percent` is for a share; with a sign, for a difference of shares, in points."""
    scale, unit, fewest = (100, " points" if sign else "\u00a0%", 1) if percent else (1, "", 0)
    ends = {"mean": math.nan, "low": -math.inf, "high": math.inf}
    mean, low, high = (scale * (end if (given := estimate[key]) is None else given) for key, end in ends.items())
    if low == high:
        return f"{mean:{sign}.3g}{unit}".replace("-", "−")
    width = high - low
    decimals = min(6, max(fewest, 1 - math.floor(math.log10(width)))) if math.isfinite(width) else fewest
    mean, low, high = (round(number, decimals) + 0.0 for number in (mean, low, high))  # + 0.0: no minus nought
    text = f"{mean:{sign}.{decimals}f}{unit} [{low:{sign}.{decimals}f}, {high:{sign}.{decimals}f}]"
    return text.replace("-", "−").replace("inf", "∞")


def join(names: Sequence[str], between: str = " and ") -> str:
    """Join names as a sentence does: a, b and c."""
    return between.join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def format_p(p: float) -> str:
    """Write a p-value, no smaller than can be known: `p = 0.031`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def format_dollars(value: float) -> str:
    """Print cents, or the first two digits where those would be noughts."""
    return f"${value:,.{2 if not 0 < value < 0.1 else min(8, 1 - math.floor(math.log10(value)))}f}"


def format_number(value: float) -> str:
    """Print two decimals, or the first digit where those would be zeros."""
    return (f"{value:.1g}" if 0 < abs(value) < 0.005 else f"{value:.2f}").replace("-", "−")


def format_seconds(value: float) -> str:
    """Print a duration in its two largest units."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def format_bytes(value: float) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


STYLES: dict[str, Callable[[Any], str]] = {
    "estimate": format_estimate,
    "gain": partial(format_estimate, sign="+"),
    "share": partial(format_estimate, percent=True),
    "difference": partial(format_estimate, sign="+", percent=True),
    "number": format_number,
    "percent": lambda value: f"{100 * value:.1f}\u00a0%",
    "count": lambda value: f"{value:,.0f}" if value == round(value) else f"{value:,.1f}",
    "rounded": lambda value: f"{value:,.0f}",
    "p": lambda value: format_p(value).removeprefix("p ").removeprefix("= "),
    "dollars": format_dollars,
    "seconds": format_seconds,
    "bytes": format_bytes,
    "short": lambda value: f"{value:.3g}".replace("-", "−"),
    "plain": str,
    "date": lambda value: value[:10],
    "moment": lambda value: value[:16].replace("T", " "),
    "text": str,
}

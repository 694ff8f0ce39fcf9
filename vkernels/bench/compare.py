"""python -m vkernels bench compare BEFORE.json AFTER.json --fail-over 5%: what became slower between two runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from vkernels.bench.results import Row, Run, Stage, load

MACHINE = ("machine", "gpu", "isa", "threads")  # where one of these differs, times do not compare
RIVALS = ("torch", "transformers", "triton", "flash_attn")  # where one of these differs, the rivals may have changed


@dataclass(frozen=True)
class Side:
    """What one run says of a row: the median ratio and its spread."""

    value: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Change:
    """One row in both runs. `gain` is its speed after over that before: 0.9 lost a tenth."""

    name: str
    kind: str  # "ratio", or "time" where there is no rival to hold it against
    before: float
    after: float
    gain: float
    beyond_spread: bool  # the two spreads do not touch
    ours_ms: tuple[float, float]
    note: str = ""

    def slower(self, fail_over: float) -> bool:
        return self.gain < 1 - fail_over and self.beyond_spread


@dataclass(frozen=True)
class Comparison:
    changes: list[Change] = field(default_factory=list)  # the worst first
    new: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    incomparable: list[str] = field(default_factory=list)  # each with its reason


def different(before: Run, after: Run, names: Sequence[str]) -> list[str]:
    """Facts of the two environments that differ, as "name: one against the other"."""
    a, b = before.environment, after.environment
    return [f"{name} {a.get(name)} against {b.get(name)}" for name in names if a.get(name) != b.get(name)]


def _name(row: Row | Stage) -> str:
    if isinstance(row, Stage):
        return f"{row.stage} [{row.dtype}]"
    unusual = [word for word in (row.direction, row.cache) if word not in ("forward", "warm")]
    return f"{row.op}: {row.id} [{', '.join([row.dtype, *unusual])}] against {row.rival}"


def _key(row: Row | Stage) -> tuple[str, ...]:
    return ("stage", row.stage, row.dtype, row.model) if isinstance(row, Stage) else row.key


def _keyed(run: Run, path: str) -> dict[tuple[str, ...], Row | Stage]:
    rows: dict[tuple[str, ...], Row | Stage] = {}
    measured: list[Row | Stage] = [*run.rows, *run.stages]
    for row in measured:
        if _key(row) in rows:
            raise ValueError(f"bench compare: {path} must hold every row once, got {_name(row)} twice")
        rows[_key(row)] = row
    return rows


def _ratio(row: Row | Stage) -> Side | None:
    if row.ratio is None:
        return None
    p20, p80 = (row.ratio if x is None else x for x in (row.ratio_p20, row.ratio_p80))
    return Side(row.ratio, p20, p80)


def _change(a: Row | Stage, b: Row | Stage, times: bool) -> Change | str:
    """The change, or the sentence that says why there is none to speak of."""
    ms = [row.ours_ms for row in (a, b)]
    before, after = _ratio(a), _ratio(b)
    note = ""
    if isinstance(a, Row) and isinstance(b, Row) and a.backend != b.backend:
        note = f"backend {a.backend or '?'}, then {b.backend or '?'}"
    if before is not None and after is not None:
        beyond = after.p80 < before.p20 or after.p20 > before.p80
        gain = after.value / before.value
        return Change(_name(a), "ratio", before.value, after.value, gain, beyond, (ms[0], ms[1]), note)
    whys = [row.why for row in (a, b) if isinstance(row, Row) and row.why]
    if not times:
        return f"{_name(a)}: no ratio in both runs ({whys[0] if whys else 'the rival was not timed'})"
    assert isinstance(a, Row)
    assert isinstance(b, Row)
    beyond = b.ours_p20_ms > a.ours_p80_ms or b.ours_p80_ms < a.ours_p20_ms
    return Change(_name(a), "time", ms[0], ms[1], ms[0] / ms[1], beyond, (ms[0], ms[1]), note)


def _moved(left: dict[tuple[str, ...], Row | Stage], others: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Keys of `left` that differ from one of `others` in the dtype alone."""
    less_dtype = {(*key[:2], *key[3:]) for key in others}
    return (key for key in left if (*key[:2], *key[3:]) in less_dtype)


def compare(before: Run, after: Run, *, times: bool, paths: tuple[str, str] = ("before", "after")) -> Comparison:
    """Row by row. `times`: rows without a rival are held by their times, which only one machine's runs allow."""
    a, b = _keyed(before, paths[0]), _keyed(after, paths[1])
    gone, new = ({k: x[k] for k in x if k not in y} for x, y in ((a, b), (b, a)))
    moved = {*_moved(gone, set(new)), *_moved(new, set(gone))}
    found = [_change(a[key], b[key], times) for key in a if key in b]
    return Comparison(
        changes=sorted((x for x in found if isinstance(x, Change)), key=lambda x: x.gain),
        new=[_name(row) for key, row in new.items() if key not in moved],
        gone=[_name(row) for key, row in gone.items() if key not in moved],
        incomparable=[
            *(x for x in found if isinstance(x, str)),
            *(f"{_name((gone | new)[key])}: another dtype in the other run" for key in sorted(moved)),
        ],
    )


def lines(comparison: Comparison, fail_over: float, *, times: bool) -> Iterator[str]:
    """The table, the worst first, and what could not be compared."""
    if comparison.changes:
        yield f"{'':6} {'change':>8} {'before':>9} {'after':>9} {'our time':>9}  case"
    for change in comparison.changes:
        mark = "SLOWER" if change.slower(fail_over) else ""
        unit = "x" if change.kind == "ratio" else "ms"
        values = " ".join(f"{value:.4g}{unit}".rjust(9) for value in (change.before, change.after))
        ours = f"{change.ours_ms[1] / change.ours_ms[0] - 1:+.1%}" if times and all(change.ours_ms) else "-"
        note = "" if change.beyond_spread else "  (within the spread)"
        if change.note:
            note += f"  ({change.note})"
        yield f"{mark:6} {change.gain - 1:>+8.1%} {values} {ours:>9}  {change.name}{note}"
    for title, rows in (("new", comparison.new), ("gone", comparison.gone), ("not compared", comparison.incomparable)):
        yield from (f"{title}: {row}" for row in rows)


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a share such as 5% or 0.05, got {text}")
    return value


def _refused(sentence: object) -> int:
    print(sentence, file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing is slower; 1: something is; 2: the files do not compare, and a sentence says why."""
    parser = argparse.ArgumentParser(prog="python -m vkernels bench compare", description=__doc__)
    parser.add_argument("before", metavar="BEFORE.json")
    parser.add_argument("after", metavar="AFTER.json")
    parser.add_argument("--fail-over", type=_share, default=0.05, metavar="5%", help="what a row may lose")
    parser.add_argument("--ratios", action="store_true", help="runs of two machines: only their leads over the rivals")
    arguments = parser.parse_args(argv)
    paths = (arguments.before, arguments.after)
    try:
        before, after = (load(path) for path in paths)
        other = different(before, after, MACHINE)
        if other and not arguments.ratios:
            return _refused(
                f"bench compare: times must be of one machine, got {'; '.join(other)}; "
                "--ratios compares each run's lead over its rivals"
            )
        times = not arguments.ratios
        comparison = compare(before, after, times=times, paths=paths)
    except OSError as error:
        return _refused(f"bench compare: {error.filename} must be a file that can be read, got {error.strerror}")
    except UnicodeDecodeError:
        return _refused(f"bench compare: {' and '.join(paths)} must be JSON, got bytes that are no text")
    except ValueError as error:
        return _refused(error)
    if not comparison.changes:
        return _refused(f"bench compare: the runs must have rows in common, got none in {paths[0]} and {paths[1]}")

    commits = [run.environment.get("commit", "?") for run in (before, after)]
    same = ": one commit, what differs is noise" if commits[0] == commits[1] else ""
    print(f"{commits[0]} before, {commits[1]} after{same}")
    for fact in different(before, after, RIVALS):
        print(f"note: {fact}: the rivals may have changed")
    for line in lines(comparison, arguments.fail_over, times=times):
        print(line)
    slower = sum(change.slower(arguments.fail_over) for change in comparison.changes)
    print(
        f"{len(comparison.changes)} rows compared, {slower} slower: lost more than {arguments.fail_over:.3g} of their "
        "ratio (of their time where there is none) and more than both runs' spread"
    )
    return 1 if slower else 0

"""Several training runs side by side, in words: at most a dozen lines, and a table on request."""

import math
from collections.abc import Iterator, Mapping, Sequence

import pandas as pd

from ...runtime.format import format_count
from ...statistics.bootstrap import LEVEL
from ...statistics.comparison import Comparison, JointParity, OverSeeds
from ...statistics.hypotheses import PART
from ...study.reading import MARGIN
from .verdict import WIDTH, Line, fitting, format_estimate, format_p

SHOWN = 8
"""Kinds of training runs that have a line; the table has all."""

SINCE = f"significant and {MARGIN:g} nats or more"
"""What a head's effect has to be from its onset on."""

Roles = Mapping[str, Mapping[str, list[str]]]
"""Training run → role → heads that have it."""


def comparison_lines(comparison: Comparison, roles: Roles | None = None) -> list[str]:
    """The answer: what holds over seeds, with its interval over seeds, and what cannot be said."""
    return [str(line) for line in lines(comparison, roles)]


def lines(comparison: Comparison, roles: Roles | None = None) -> Iterator[Line]:
    """The same by its parts."""
    groups = list(comparison.over_seeds)
    yield Line("", _question(comparison, groups))
    if len(groups) == 1:
        yield from _of_seeds(comparison, groups[0])
    else:
        yield from (_of_group(comparison, group) for group in groups[:SHOWN])
        if len(groups) > SHOWN:
            yield Line("", f"and {len(groups) - SHOWN} more: --verbose")
    if roles:
        yield Line("roles", _roles(roles, len(comparison.table)))
    yield Line("heads", "numbers of heads mean nothing across training runs: heads are matched by size of effect")
    if len(groups) == len(comparison.table):
        yield Line("seeds", "one training run each: what differs may be the seed alone; no interval over seeds")


def _question(comparison: Comparison, groups: Sequence[str]) -> str:
    n = len(comparison.table)
    labels = list(dict.fromkeys(comparison.at.values()))
    at = f"at {labels[0]}" if len(labels) == 1 else f"at {labels[0]} to {labels[-1]}"
    runs, aligned = format_count(n, "training run"), f"aligned by {comparison.unit}"
    of = groups[0] if len(groups) == 1 else f"{len(groups)} kinds"
    return fitting(f"{runs} of {of}, {at}, {aligned}", f"{runs}, {at}, {aligned}", width=WIDTH)


def _of_seeds(comparison: Comparison, group: str) -> Iterator[Line]:
    """Training runs that differ in nothing but the seed."""
    members, seeds = comparison.table[comparison.table["group"] == group], comparison.over_seeds[group]
    yield Line("task", _dated(seeds["capability"], "both prompts right", comparison.unit))
    if "all" in seeds:
        layers = sorted(set(members["layer"]))
        where = f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}{', by seed' * (len(layers) > 1)}"
        yield Line("layer", f"all heads of {where}: {_over_seeds(seeds['all'])}")
    if "head_1" in seeds:
        heads = ", ".join(heads[0] for heads in members["heads"] if heads)
        effect = f"the head with the largest effect: {_over_seeds(seeds['head_1'])}"
        yield Line("largest", fitting(f"{effect} ({heads})", effect))
    if "head_1_from" in seeds:
        yield Line("  from", _dated(seeds["head_1_from"], SINCE, comparison.unit))
    if "parity" in seeds:
        yield Line("even/odd", _parity(seeds["parity"], comparison.parity.get(group), seeds.get("all")))


def _roles(roles: Roles, n_runs: int) -> str:
    """`induction in 3 of 3 (L1.H0; L1.H2; L1.H1)`, the roles that most training runs have first."""
    having = {role: [heads[role] for heads in roles.values() if heads.get(role)] for role in next(iter(roles.values()))}
    present = sorted((role for role in having if having[role]), key=lambda role: -len(having[role]))
    measured = f" of {len(roles)}" if len(roles) == n_runs else f" of the {len(roles)} measured"
    if not present:
        return f"no head has one in any{measured}"
    texts = [f"{role} in {len(having[role])}{measured}" for role in present]
    first = f"{texts[0]} ({'; '.join(heads[0] for heads in having[present[0]])})"
    return fitting(*(", ".join([first, *texts[1:n]]) for n in range(len(texts), 0, -1)), texts[0])


def _over_seeds(over: OverSeeds) -> str:
    """`+3.5 [+1.9, +5.1] nats over 3 seeds (+2.9 to +4.4)`."""
    return f"{_estimate(over)} ({over.least:+.2f} to {over.most:+.2f})"


def _estimate(over: OverSeeds) -> str:
    return f"{format_estimate(over.mean, over.low, over.high)} nats over {format_count(over.n, 'seed')}"


def _dated(over: OverSeeds, what: str, unit: str) -> str:
    if over.n == 0:
        return f"{what} in none of {format_count(over.of, 'seed')}"
    who = (
        f"in {over.n} of {over.of} seeds"
        if over.n < over.of
        else f"in {'both' if over.n == 2 else f'all {over.n}'} seeds"
    )
    if over.least == over.most:
        return f"{what} {who}, from {format_position(over.least)} {unit} on"
    where = f"from {format_position(over.least)} to {format_position(over.most)} {unit} on"
    if math.isnan(over.low):
        return f"{what} {who}, {where}"
    mean = f"mean {format_position(over.mean)} [{format_position(max(over.low, 0))}, {format_position(over.high)}]"
    return fitting(f"{what} {who}, {where}, {mean}", f"{what} {who}, {where}")


def format_position(value: float) -> str:
    """A point of training, steps or tokens: `48`, `12k`, `4.2B`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'k' else size):.3g}{suffix}"
    return f"{value:.0f}"


def _parity(over: OverSeeds, joint: JointParity | None, whole: OverSeeds | None) -> str:
    """No p over seeds, no verdict over seeds; and no pattern only where the interval over seeds excludes one of the
    size that is asked about within a training run, a part of the whole layer's effect."""
    if joint is None:
        return fitting(
            f"not tested: {_over_seeds(over)}; not every run has equal splits", f"not tested: {_estimate(over)}"
        )
    if joint.least > 1 - LEVEL:
        return fitting(f"cannot tell: {_estimate(over)}; of so few relabellings p is at least {joint.least:.2f}")
    size = math.nan if whole is None else max(PART * abs(whole.mean), MARGIN)
    is_excluded = over.low > -size and over.high < size
    verdict = "yes" if joint.p <= 1 - LEVEL else "no pattern" if is_excluded else "cannot tell"
    test = f"joint permutation {format_p(joint.p)}"
    return fitting(f"{verdict}: {_over_seeds(over)}, {test}", f"{verdict}: {_estimate(over)}, {test}")


def _of_group(comparison: Comparison, group: str) -> Line:
    """One kind of training run among others, on a line: over its seeds, or over prompts where there is but one."""
    seeds = comparison.over_seeds[group]
    row = comparison.table[comparison.table["group"] == group].iloc[0]
    n = seeds["capability"].of
    parts = []
    for name, words in {"all": "all heads", "head_1": "largest"}.items():
        if name in seeds and seeds[name].n:
            over = seeds[name]
            bounds = (over.low, over.high) if n > 1 else (row[f"{name}_low"], row[f"{name}_high"])
            parts.append(f"{words} {format_estimate(over.mean, *bounds)}")
    learnt = seeds["capability"]
    since = f"task from {format_position(learnt.mean)} {comparison.unit}" if learnt.n else "task not learnt"
    parts.append(since if learnt.n in (0, n) else f"{since} in {learnt.n} of {n}")
    joint = comparison.parity.get(group)
    test = [] if joint is None or joint.least > 1 - LEVEL else [f"even/odd {format_p(joint.p)}"]
    name = f"{group}, {format_count(n, 'seed') if n > 1 else 'over prompts'}"
    variants = ("; ".join([*parts, *test]), "; ".join(parts), "; ".join(parts[:2]), parts[0])
    return Line("", fitting(*(f"{name}: {text}" for text in variants), width=WIDTH))


def comparison_table(comparison: Comparison) -> pd.DataFrame:
    """Every training run, cells as text."""
    table = comparison.table
    columns: dict[str, list[str]] = {"at": table["checkpoint"].tolist(), "layer": table["layer"].astype(str).tolist()}
    for name, title in {"all": "all heads", "head_1": "largest head", "parity": "even − odd"}.items():
        if name in table:
            bounds = table[[name, f"{name}_low", f"{name}_high"]].to_numpy()
            columns[title] = ["" if math.isnan(row[0]) else format_estimate(*row) for row in bounds]
    columns["heads"] = [" ".join(heads) for heads in table["heads"]]
    if "parity_p" in table:
        columns["even/odd"] = ["" if math.isnan(p) else format_p(p) for p in table["parity_p"]]
    return pd.DataFrame(columns, index=table.index.rename(None))

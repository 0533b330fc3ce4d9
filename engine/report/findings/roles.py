"""The roles of heads as people read them: which heads have which, since when, and whether those are the ones that
matter."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ...measures.logit_diff import finished
from ...mechanism.role_summary import causal_heads, heads_in_role, in_role, loss_bump, role_shares, roles_frame
from ...runtime.format import format_count, format_head
from ...statistics.bootstrap import LEVEL
from ...study.mechanism_settings import MechanismSettings
from ...study.role_settings import MARGIN, ROLES, Role
from .finding import Finding

SHOWN = 3
"""Heads that a line names."""

RULE = f"score at least {MARGIN:g} above its null, adjusted p at most {100 * (1 - LEVEL):.0f} %"


def role_lines(run: xr.Dataset, settings: MechanismSettings) -> Iterator[str]:
    """Which heads have which role at the last finished checkpoint, and what they have to do with the effects."""
    complete = finished(run).load()
    final = complete.isel(checkpoint=[-1])
    rows = _rows(complete, str(final.checkpoint.values[0]))
    yield f"roles      {RULE}"
    absent = []
    for role in ROLES:
        heads = heads_in_role(final, role)
        if not heads:
            absent.append(role)
            continue
        named = [_head_in_role(rows[role, *head], head) for head in heads[:SHOWN]]
        more = f", {len(heads) - SHOWN} more" if len(heads) > SHOWN else ""
        yield f"  {role:<16} {', '.join(named)}{more}"
    problems = dict(zip(ROLES, final.role_problem.values[0], strict=True))
    unscored = [role for role in absent if problems[role]]
    nowhere = [role for role in absent if not problems[role]]
    if nowhere:
        yield f"  {'no head':<16} {', '.join(nowhere)}"
    if unscored:
        yield f"  {'not scored':<16} {', '.join(unscored)} (--verbose says why)"
    if bump := loss_bump(complete):
        yield f"repetition learned most between {bump.after} and {bump.by}: {bump.fall:.2f} nats a token"
    if "patching" in settings.parts:
        yield from _causal_lines(final)


Row = Mapping[str, Any]
"""A row of `roles_frame`."""


def _rows(complete: xr.Dataset, label: str) -> dict[tuple[Role, int, int], Row]:
    """By role, layer and head, at one checkpoint."""
    frame: Any = roles_frame(complete).loc[label]
    return dict(frame.to_dict("index"))


def _head_in_role(row: Row, head: tuple[int, int]) -> str:
    """`L1.H0 0.93 from step48-56`; no onset where it was there at the first checkpoint, or at no two running."""
    since: str = f" from {_between(row['after'], row['by'])}" if pd.notna(row["after"]) else ""
    return f"{format_head(*head)} {row['score']:.2f}{since}"


def _between(after: str, by: str) -> str:
    """`step48-56` of step48 and step56."""
    stem = by.rstrip("0123456789")
    return f"{after}-{by[len(stem) :]}" if stem and after.startswith(stem) else f"{after} to {by}"


def _causal_lines(final: xr.Dataset) -> Iterator[str]:
    heads = causal_heads(final)
    if not heads:
        yield "matters    no single head's effect is significant at this checkpoint"
        return
    yield "matters    heads with the largest effects, patched at the last position (nats)"
    for head in heads[:SHOWN]:
        yield f"  {format_head(head.layer, head.head):<8} {head.effect:+.2f}  {', '.join(head.roles) or 'no role'}"
    for share in sorted(role_shares(final), key=lambda share: (np.nan_to_num(share.p, nan=2), -share.share))[:SHOWN]:
        yield f"  {share.role} heads: {share.share:.0%} of all effects{_among_others(share.p)}"


def _among_others(p: float) -> str:
    """What the heads' share of the effects says of them."""
    if np.isnan(p):
        return "; they are all heads of their layers"
    if p <= 1 - LEVEL:
        return f", more than others of their layers (p = {p:.3f})"
    return f"; others of their layers may have as much (p = {p:.2f})"


def roles_finding(run: xr.Dataset, settings: MechanismSettings) -> Finding:
    """A row a head that has any role at any checkpoint, with its scores at the last, and when it took each on."""
    complete = finished(run).load()
    label = str(complete.checkpoint.values[-1])
    by_head = _rows(complete, label)
    ever = in_role(complete).any("checkpoint").transpose("role", "layer", "head").values
    layers, heads = complete.layer.values, complete["head"].values
    rows = [
        (role, layer, head, by_head[role, layer, head])
        for role, layer, head in (
            (ROLES[role], int(layers[layer]), int(heads[head])) for role, layer, head in np.argwhere(ever)
        )
    ]
    table = pd.DataFrame(
        {
            "role": [role for role, *_ in rows],
            "score": [f"{row['score']:.2f}" for *_, row in rows],
            "null": [f"{row['null']:.2f}" for *_, row in rows],
            "p": [f"{row['p']:.3f}" for *_, row in rows],
            "starts": [_onset(row) for *_, row in rows],
        },
        index=pd.Index([format_head(layer, head) for _, layer, head, _ in rows]),
    )
    if "patching" in settings.parts:
        effect = complete.effect.isel(checkpoint=-1).mean("trial")
        table["effect"] = [f"{float(effect.sel(layer=layer, head=head)):+.2f}" for _, layer, head, _ in rows]
    notes = tuple(_notes(complete, label, bool(rows)))
    return Finding("Roles of heads", table if rows else None, notes, "roles", roles_frame(complete))


def _onset(row: Row) -> str:
    if pd.isna(row["by"]):
        return "not for two checkpoints running"
    return f"by {row['by']}" if pd.isna(row["after"]) else f"{row['after']} to {row['by']}"


def _notes(complete: xr.Dataset, label: str, has_rows: bool) -> Iterator[str]:
    if not has_rows:
        yield "no head has a role at any checkpoint"
    yield (
        f"a head has a role with a {RULE} over\n"
        f"the checkpoint's heads; score, null, p (and effect, in nats) at {label}; it starts by the first\n"
        "of two consecutive checkpoints with it"
    )
    problems: dict[str, list[Role]] = {}
    for role, problem in zip(ROLES, complete.role_problem.values[-1], strict=True):
        if problem:
            problems.setdefault(str(problem), []).append(role)
    yield from (f"not scored: {', '.join(roles)}: {problem}" for problem, roles in problems.items())
    n = complete.sizes["sequence"]
    first, second = (float(complete[f"loss_{half}"].isel(checkpoint=-1).mean()) for half in ("first", "second"))
    if not np.isnan(first):
        drawn = format_count(n, "sequence")
        yield f"loss on random tokens {first:.2f} nats, on their repetition {second:.2f} ({drawn}) at {label}"
    if bump := loss_bump(complete):
        yield f"the second falls most between {bump.after} and {bump.by}: {bump.fall:.2f} nats"

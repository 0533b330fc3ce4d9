"""Checkpoints that cannot be what their names say, told by the hashes of their files: nothing is read or downloaded.

The same weights under two steps, whole or one shard of them; a step that is the final checkpoint's; a `main` that is
not the last step.  Findings are names; `report.findings.doctor` has the sentences.
"""

from collections.abc import Iterable, Iterator, Mapping

from . import files
from .training_place import MAIN, UNKNOWN, training_order
from .weight_findings import NamedWeights, NotTheLast, SameWeights


def compare(checkpoints: Iterable[NamedWeights]) -> list[SameWeights | NotTheLast]:
    """What cannot be true of a series, the whole weights first, then their shards.

    A label without a step (a tag, a branch) may be another name of any checkpoint; `main` may be one of the last.
    """
    by_label = {each.label: each for each in checkpoints}
    series = [by_label[label] for label in training_order({label: each.place for label, each in by_label.items()})]
    final = last_labels(series)
    whole: dict[tuple[str, tuple[tuple[str, str], ...]], list[NamedWeights]] = {}
    shards: dict[tuple[str, str], list[NamedWeights]] = {}
    for each in series:
        for form, parts in by_form(each.sha256).items():
            whole.setdefault((form, tuple(sorted(parts.items()))), []).append(each)
            for name, digest in parts.items():
                shards.setdefault((name, digest), []).append(each)
    findings = [
        finding for (_, parts), group in whole.items() for finding in _same(group, final, dict(parts), is_whole=True)
    ]
    by_labels: dict[tuple[str, ...], dict[str, str]] = {}
    for (name, digest), group in shards.items():
        by_labels.setdefault(tuple(each.label for each in group), {})[name] = digest
    for labels, parts in by_labels.items():
        findings += _same([by_label[label] for label in labels], final, parts, is_whole=False)
    return [*_distinct(findings), *_main_is_not_its_step(series)]


def _distinct(findings: list[SameWeights]) -> Iterator[SameWeights]:
    """Each set of checkpoints once: of files that belong to equal weights nothing is said."""
    said: list[set[str]] = []
    for finding in findings:
        if not any(set(finding.labels) <= labels for labels in said):
            yield finding
            if not finding.shards:
                said.append(set(finding.labels))


def by_form(sha256: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The hashes of weight files, by the form of weights that each belongs to."""
    forms: dict[str, dict[str, str]] = {}
    for name, digest in sha256.items():
        for form in files.WEIGHTS:
            if name == form or (files.is_index(form) and files.looks_like_shard(name, form)):
                forms.setdefault(form, {})[name] = digest
    return forms


def last_labels(series: Iterable[NamedWeights]) -> set[str]:
    """Labels of the last step of each stage."""
    last: dict[str, NamedWeights] = {}
    for each in series:
        stage = each.place.stage
        if each.step >= 0 and (stage not in last or each.step >= last[stage].step) and each.label != MAIN:
            last[stage] = each
    return {each.label for each in last.values()}


def _same(
    group: list[NamedWeights], final: set[str], parts: Mapping[str, str], is_whole: bool
) -> Iterator[SameWeights]:
    """The finding that a group of checkpoints shares `parts`, unless its names allow that."""
    labels = {each.label for each in group}
    stepped = [each for each in group if each.step > UNKNOWN and each.label != MAIN]
    is_main_elsewhere = MAIN in labels and bool(stepped) and not final & labels
    if len({(each.place.stage, each.step) for each in stepped}) > 1 or is_main_elsewhere:
        named = tuple(each.label for each in group if each in stepped or each.label == MAIN)
        is_final = bool(final & labels) or MAIN in labels
        yield SameWeights(named, next(iter(parts.values())), () if is_whole else tuple(sorted(parts)), is_final)


def _main_is_not_its_step(series: list[NamedWeights]) -> Iterator[NotTheLast]:
    main = next((each for each in series if each.label == MAIN and each.step >= 0), None)
    for each in series:
        if main is not None and each.label != MAIN and each.step == main.step:
            ours, theirs = by_form(main.sha256), by_form(each.sha256)
            forms = [form for form in ours if form in theirs]
            if forms and all(ours[form] != theirs[form] for form in forms):
                yield NotTheLast(each.label)

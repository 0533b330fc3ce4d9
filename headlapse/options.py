"""What the commands can be asked: every option once, for the command line and for Python alike.

The docstring beneath a field is its help.  A command takes one of these dataclasses; `refuse_impossible` raises for
whatever is wrong whatever the model and the store, before torch is imported.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, get_args

from cyclopts import Group, Parameter

from .engine.runtime.errors import UserError
from .engine.runtime.format import format_whole, parse_bytes, parse_json
from .engine.study.known_heads import CHECKS, CheckName
from .engine.study.mechanism_settings import PARTS, Part
from .engine.study.patch_settings import Direction, PatchRequest, Protocol
from .engine.study.reading import MARGIN, Correction, Reading
from .engine.study.study import ARITHMETICS, DTYPES, MEASURES, Arithmetic, Dtype, Measure, Study
from .engine.study.tasks.registry import TASKS
from .slurm import PREFIX, parse_request, refuse_absent

COMPUTING = Group("Computing", sort_key=2)

MOST_LAYERS = MOST_HEADS = 1024
"""No model has more: words that are wrong even then are wrong for every model."""

MOST_SEEDS = 1000
"""So many are taken at once."""

LIST = "list"
"""The word of `--checkpoints` that lists what there is."""

FOLDER_EVERY, HUB_EVERY = 10.0, 300.0
"""Seconds from one look at a training that goes on to the next, where `--every` says nothing."""

_MOVING = (LIST, "log", "study")
"""Words of `--checkpoints` that mean what a finished training has."""

LONGEST_TEXT = 100_000
"""Greedy tokens of one patched run; more are refused."""

LONGEST_NAME = 200
"""Bytes of a folder's name, with room for what is added to it while it is written."""

MOST_PROMPTS = 1_000_000
"""No store has more: numbers of prompts that are wrong even then are wrong for every store."""

FEWEST_KNOWN_TRIALS = 2
"""Prompt pairs of a check against the literature: one alone tells nothing from chance."""

_TAKEN_NAMES = ("zarr.json",)
"""Files that zarr keeps in the folder where a store's patched runs stand."""

_TASK_HELP = "\n\n".join(
    [
        "one of these, or a JSON Lines file such as prompts.jsonl with lines like "
        '{"clean": "2+2=", "corrupt": "2+3=", "answer": "4", "wrong": "5"} (default: decimal)',
        *(f"{name}: {task.asks}" for name, task in TASKS.items()),
    ]
)


@dataclass(frozen=True)
class StoreOption:
    """Which store a command works on."""

    store: Path | None = None
    """e.g. cache/demo-decimal.zarr (default: the newest under cache/)"""


@dataclass(frozen=True, kw_only=True)
class WeightsOption:
    """Where the weights of a store lie now."""

    weights: Path | None = None
    """where the weights lie now, if they were moved since they were cached: a folder with one for each checkpoint,
    e.g. /data/pythia-160m (default: where they were)"""

    def refuse_missing_weights(self) -> None:
        """Raise `UserError` where there is no such folder."""
        if self.weights is not None and not self.weights.is_dir():
            raise UserError(
                f"--weights {self.weights}: there is no such folder; name the one that holds the checkpoints"
            )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Where a command computes."""

    device: Annotated[str | None, Parameter(group=COMPUTING)] = None
    """e.g. cpu or cuda:0 (default: cuda where there is one)"""

    memory: Annotated[str | None, Parameter(group=COMPUTING)] = None
    """what weights and computing may take together, e.g. 8GB (default: three quarters of what there is)"""

    def refuse_impossible(self) -> None:
        """Raise `UserError` for what no model and no store can answer."""
        if self.memory:
            parse_bytes(self.memory)


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions):
    """Where a command computes, and in how many processes."""

    workers: Annotated[str | None, Parameter(group=COMPUTING)] = None
    """who shares the checkpoints: local:N starts N processes here, one GPU each where there are GPUs;
    slurm:KEY=VALUE,... submits jobs to a cluster, with any of the keys partition account qos constraint gpus cpus mem
    time jobs, e.g. local:4 | slurm:partition=gpu,gpus=1,time=2:00:00,jobs=8"""

    shard: Annotated[str | None, Parameter(group=COMPUTING)] = None
    """this process's share of the checkpoints: I/N takes those whose place is I modulo N, from 0; N processes on one
    store do together what one does, e.g. 0/4"""

    def refuse_impossible(self) -> None:
        super().refuse_impossible()
        self.share([])
        if (self.n_workers > 1 or self.on_cluster) and self.shard:
            raise UserError("--workers starts the shards itself; leave --shard out")
        if self.on_cluster:
            assert self.workers is not None
            parse_request(self.workers)
            refuse_absent(self.workers)

    def refuse_replacing_jobs(self, overwrite: bool) -> None:
        """Raise `UserError` where jobs are to replace something: one that starts late would replace it once more."""
        if overwrite and self.on_cluster:
            raise UserError(
                f"--workers {self.workers} and --overwrite: a job that starts late could not tell the old from the "
                "new; remove the old (headlapse rm) and leave --overwrite out"
            )

    @property
    def on_cluster(self) -> bool:
        """Whether jobs of a cluster do the work."""
        return self.workers is not None and self.workers.partition(":")[0] == PREFIX

    @property
    def n_workers(self) -> int:
        """Processes to start here.  Raises `UserError` where `--workers` cannot be read."""
        if self.workers is None or self.on_cluster:
            return 1
        match = re.fullmatch(r"local:(\d{1,4})", self.workers, re.ASCII)
        if match is None or int(match[1]) < 1:
            raise UserError(
                f"--workers {self.workers}: write local:N, e.g. local:4, or slurm:KEY=VALUE,..., "
                "e.g. slurm:partition=gpu,gpus=1,time=2:00:00"
            )
        return int(match[1])

    def share(self, labels: list[str]) -> list[str]:
        """The labels that are left to this process or job.  Raises `UserError` where `--shard` cannot be read."""
        if self.shard is None:
            return labels
        if (taken := _labels_in(self.shard)) is not None:
            return [label for label in labels if label in taken]
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", self.shard, re.ASCII)
        if match is None or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard {self.shard}: write I/N with I from 0 to N - 1, e.g. 0/4")
        return labels[int(match[1]) :: int(match[2])]


@dataclass(frozen=True)
class PatchOptions(WeightsOption, ComputeOptions, StoreOption):
    """Options of `headlapse patch`."""

    _: KW_ONLY

    subsets: tuple[str, ...] = ()
    """which heads: even odd none all, each (single heads), but (all but one), balanced (every equal split), lattice
    (all subsets), size:K (all of K heads), random:N, splits:N (even, odd and N random equal splits, each with its
    complement; splits alone: as many as double the default run), orders:N (beginnings of N random orders and their
    reverses, for Shapley values), or heads themselves, e.g. even odd 0,2,4 size:6 random:100 (default: even odd all
    each splits)"""

    layers: tuple[str, ...] = ()
    """which layers, one at a time, e.g. all | 6 | 4-8 11 (default: all)"""

    joint: bool = False
    """patch those layers all at once, e.g. --layers 4-8 --joint"""

    positions: Annotated[str, Parameter(allow_leading_hyphen=True)] = "last"
    """last, end:K (the last K) or all (prompts of equal length), e.g. end:3 (default: last)"""

    direction: Direction = "denoise"
    """denoise (clean into corrupt) or noise (corrupt into clean), e.g. noise (default: denoise)"""

    checkpoints: tuple[str, ...] = ("all",)
    """which of the store's checkpoints, e.g. step1000 step4000..main (default: all)"""

    measures: tuple[Measure, ...] = ()
    """beside the logit difference: probability, rank, kl (from the clean run) or sequence (whole answers),
    e.g. probability kl"""

    protocol: Protocol = "corrected"
    """corrected (z of true heads at aligned positions) or published (the study bug for bug: layer 6, slices of the
    attention's output, 20 greedy tokens), e.g. published (default: corrected)"""

    correction: Correction = "bh"
    """multiple-comparison correction over layers and checkpoints, e.g. holm (default: bh)"""

    primary: tuple[str, ...] = ()
    """what is expected, written into the run with date and hash before anything is patched, and tested at its own 5 %:
    even against odd heads of a layer, or a head, at a checkpoint, e.g. layer:6@step143000 L3.H1@step512 (default:
    nothing)"""

    margin: float = MARGIN
    """nats: "no effect" is said only of what is surely smaller, e.g. 0.2 (default: 0.5)"""

    select_on: tuple[str, ...] = ()
    """prompts, by number from 0, on which the verdict chooses the layer and the heads that it names, e.g. 0-6 (default:
    the layer is chosen on one half and estimated on the other; heads on all)"""

    test_on: tuple[str, ...] = ()
    """prompts on which they are estimated and tested, e.g. 7-14 (default: all that --select-on leaves)"""

    generate: int = 0
    """greedy tokens of every patched run as well, e.g. 20 (default: none)"""

    name: str | None = None
    """what to call the run in the store, e.g. parity (default: from the settings)"""

    dtype: Annotated[Arithmetic | None, Parameter(group=COMPUTING, metavar="DTYPE")] = None
    """arithmetic of the replay, e.g. float32, or tf32 on CUDA devices (default: the store's)"""

    verbose: bool = False
    """print every table, not the verdict alone"""

    overwrite: bool = False
    """replace an existing run of that name"""

    @property
    def reading(self) -> Reading:
        """How the numbers are read."""
        return Reading(self.correction, self.margin, self.select_on, self.test_on)

    def request(self, default: PatchRequest) -> PatchRequest:
        """What is asked of every checkpoint, with the subsets and layers of `default` where none are named."""
        how = (self.joint, self.positions, self.direction, self.dtype, self.measures, self.generate, self.primary)
        return PatchRequest(self.subsets or default.subsets, self.layers or default.layers, *how)

    def refuse_impossible(self) -> None:
        from .engine.study.alignment import patched_positions
        from .engine.study.primary import parse_primary
        from .engine.study.subsets import count_subsets, parse_layers

        super().refuse_impossible()
        self.refuse_replacing_jobs(self.overwrite)
        self.refuse_missing_weights()
        refuse_unknown("--measures", self.measures, MEASURES)
        refuse_unknown("--protocol", [self.protocol], get_args(Protocol))
        refuse_unknown("--correction", [self.correction], get_args(Correction))
        refuse_unknown("--direction", [self.direction], get_args(Direction))
        refuse_unknown("--dtype", [self.dtype] if self.dtype else [], ARITHMETICS)
        if not 0 < self.margin < math.inf:
            raise UserError(f"--margin {self.margin}: a margin is a number of nats above 0, e.g. 0.5")
        if self.name is not None:
            refuse_bad_name(self.name)
        if not 0 <= self.generate <= LONGEST_TEXT:
            bound = "at least 0" if self.generate < 0 else f"at most {LONGEST_TEXT:,}"
            raise UserError(f"--generate {format_whole(self.generate)}: a number of tokens is {bound}")
        for word in self.subsets:
            count_subsets(word, MOST_HEADS)
        if self.layers:
            parse_layers(self.layers, range(MOST_LAYERS))
        patched_positions(self.positions)
        parse_primary(self.primary)
        self.reading.prompts(MOST_PROMPTS)


@dataclass(frozen=True)
class MechanismOptions(WeightsOption, ComputeOptions, StoreOption):
    """Options of `headlapse mechanism`."""

    _: KW_ONLY

    checkpoints: tuple[str, ...] = ("all",)
    """which of the store's checkpoints, e.g. step1000 step4000..main (default: all)"""

    parts: tuple[Part, ...] = PARTS
    """attribution (what each head adds to the logit difference directly), attention (to the first token, the previous,
    itself, the digits), weights (QK and OV: norms, change, cosines), patching (gradient estimate beside the exact
    effect), roles (induction, copying and other known roles), e.g. attribution weights (default: all)"""

    direction: Direction = "denoise"
    """of patching, e.g. noise, as of `headlapse patch` (default: denoise)"""

    dtype: Annotated[Arithmetic | None, Parameter(group=COMPUTING, metavar="DTYPE")] = None
    """arithmetic, e.g. float32 (default: the store's)"""

    verbose: bool = False
    """print every checkpoint, not the last alone"""

    overwrite: bool = False
    """replace what was measured before"""

    def refuse_impossible(self) -> None:
        super().refuse_impossible()
        self.refuse_replacing_jobs(self.overwrite)
        self.refuse_missing_weights()
        refuse_unknown("--parts", self.parts, PARTS)
        refuse_unknown("--direction", [self.direction], get_args(Direction))
        refuse_unknown("--dtype", [self.dtype] if self.dtype else [], ARITHMETICS)


Then = Annotated[
    tuple[PatchOptions | MechanismOptions, ...],
    Parameter(accepts_keys=False, n_tokens=1, converter=lambda *_: (), metavar="COMMAND..."),
]
"""What stands behind `--then`: the command line puts it there."""


@dataclass(frozen=True, kw_only=True)
class SeriesOptions(DeviceOptions):
    """Where the checkpoints of a training are, what is asked of them, and what is kept of it."""

    model: str
    """where the training writes its checkpoints: a directory, there or not yet (with a slash at its end, for it to be
    no hub id), a hub id, or a template of either as in `headlapse cache`, e.g. out/ | 'runs/it_{step}'"""

    revision: str | None = None
    """the branch or tag, or what those of the series look like, with {stage}, {step}, {tokens} and * for what differs,
    e.g. 'stage1-step{step}-*' (default: all of them)"""

    subfolder: str | None = None
    """where in a repository or directory the files are, or what folders of a series look like, e.g.
    'hf_ckpt/{tokens}' (default: at its top)"""

    tokenizer: str | None = None
    """a hub id or a directory, where checkpoints do not bring their own, e.g. EleutherAI/pythia-160m (default: each
    checkpoint's own)"""

    checkpoints: tuple[str, ...] = ()
    """which of them, as they come: labels, globs or ranges, e.g. 'checkpoint-*00' | 1000..8000 (default: all)"""

    task: Annotated[str, Parameter(help=_TASK_HELP)] = "decimal"

    trials: int | None = None
    """distinct prompt pairs, e.g. 30 (default: 15, or all lines of a file)"""

    sites: tuple[str, ...] = ("all",)
    """what to keep: all, only what patching some layers needs, or z alone, e.g. all | 6 | 4-8 | z (default: all)"""

    store: Path | None = None
    """where to keep it, e.g. cache/mine.zarr (default: cache/<model>-<task>.zarr)"""

    dtype: Annotated[Dtype, Parameter(group=COMPUTING, metavar="DTYPE")] = "float32"
    """arithmetic and what is stored, e.g. float16 (default: float32)"""

    keep_weights: int | None = None
    """of what is downloaded, keep the weights of at most so many checkpoints at a time: they are removed once they are
    cached, and done with by what stands after --then, e.g. 2 (default: all are kept)"""

    then: Then = ()
    """another command for the checkpoints once they are cached, with its options, to the end of the line or the next
    --then, e.g. patch --subsets each (default: nothing)"""


@dataclass(frozen=True, kw_only=True)
class CacheOptions(SeriesOptions, ComputeOptions):
    """Options of `headlapse cache`."""

    model: str = "demo"
    """demo (trained here), a hub id such as EleutherAI/pythia-160m, or a directory; {step} and {tokens} in it stand for
    what differs where every checkpoint has a repository or a directory of its own, {seed} and {size} for each of
    --seeds and --sizes, e.g. 'EleutherAI/pythia-{size}-seed{seed}' | 'TinyLlama/TinyLlama-1.1B-*step-{step}-{tokens}'
    (default: demo)"""

    seeds: str | None = None
    """seeds to put into --model, each a store of its own, e.g. 1-9 or 1,2,5 (default: none)"""

    sizes: str | None = None
    """sizes to put into --model, each a store of its own, e.g. 70m,160m (default: none)"""

    checkpoints: tuple[str, ...] = ()
    """labels, globs, a range of steps or tokens, or a set (study = the published eleven, log, all); with list, say what
    there is and stop, e.g. step1000 main | 'stage1-*' | step120000..step143000 | study | list (default: what suits the
    model)"""

    plan: bool = False
    """say what would be fetched and stored, and stop"""

    overwrite: bool = False
    """replace an existing store whose settings differ"""

    @property
    def study(self) -> Study:
        """The question.  Raises `UserError` where it is none."""
        places = self.revision, self.subfolder, self.tokenizer
        return Study(self.model, self.task, self.trials, self.sites, self.dtype, *places)

    @property
    def lists(self) -> bool:
        """Whether the checkpoints are to be listed, not cached."""
        return LIST in self.checkpoints

    def each_series(self) -> "Iterator[CacheOptions]":
        """These options for every size and seed, each into a store of its own; themselves where none is asked for."""
        seeds = list(map(str, parse_seeds(self.seeds))) if self.seeds is not None else [""]
        for size, seed in itertools.product(self.sizes.split(",") if self.sizes is not None else [""], seeds):

            def filled(text: str, size: str = size, seed: str = seed) -> str:
                return text.replace("{size}", size).replace("{seed}", seed)

            yield replace(
                self,
                model=filled(self.model),
                revision=self.revision and filled(self.revision),
                subfolder=self.subfolder and filled(self.subfolder),
                seeds=None,
                sizes=None,
            )

    def refuse_impossible(self) -> None:
        from .engine.study.prompts import check_task

        super().refuse_impossible()
        self.refuse_replacing_jobs(self.overwrite)
        if self.on_cluster and self.keep_weights is not None:
            raise UserError(
                f"--workers {self.workers} and --keep-weights: jobs keep what they fetch; start each share by --shard, "
                "which lets go (docs/cluster.md)"
            )
        self._refuse_misplaced("seed", self.seeds, "1-9")
        self._refuse_misplaced("size", self.sizes, "70m,160m")
        if self.seeds is not None:
            parse_seeds(self.seeds)
        if self.sizes is not None and not re.fullmatch(r"[\w.-]+(,[\w.-]+)*", self.sizes):
            raise UserError(f"--sizes {self.sizes}: write words with commas between, e.g. 70m,160m")
        if self.subfolder is not None and not re.fullmatch(r"(?!/)(?!.*(^|/)\.\.?(/|$)).+", self.subfolder):
            raise UserError(f"--subfolder {self.subfolder}: write a folder below, e.g. 'hf_ckpt/{{tokens}}'")
        refuse_unknown("--dtype", [self.dtype], DTYPES)
        if self.store is not None:
            refuse_bad_store(self.store)
        if self.keep_weights is not None and self.keep_weights < 1:
            raise UserError(f"--keep-weights {self.keep_weights}: at least those of one checkpoint are needed")
        if self.overwrite and (self.keep_weights is not None or self.then):
            raise UserError("--overwrite with --keep-weights or --then: remove the old store first, with headlapse rm")
        for command in self.then:
            if command.store is not None or command.checkpoints != ("all",):
                raise UserError("--then: what follows works on the checkpoints that are cached; leave out which")
            command.refuse_impossible()
        check_task(self.study.task)

    def _refuse_misplaced(self, field: str, given: str | None, example: str) -> None:
        """Raise `UserError` for a field that nothing is given for, and what is given for a field that is not there."""
        place, option = f"{{{field}}}", f"--{field}s"
        varied = {"--model": self.model, "--revision": self.revision, "--subfolder": self.subfolder}
        found = [f"{name} {value}" for name, value in varied.items() if value and place in value]
        if given is None and found:
            raise UserError(f"{found[0]}: give the {field}s that {place} stands for, e.g. {option} {example}")
        if given is not None and not found:
            raise UserError(
                f"{option} {given}: --model {self.model} has no place for them; write {place} where they stand"
            )
        if given is not None and self.store is not None:
            raise UserError(f"--store {self.store}: each of {option} has a store of its own; leave --store out")


Sharable = CacheOptions | PatchOptions | MechanismOptions
"""Options of the commands whose checkpoints processes and jobs can share."""


@dataclass(frozen=True, kw_only=True)
class VerifyKnownOptions(DeviceOptions):
    """Options of `headlapse verify-known`."""

    only: tuple[CheckName, ...] = ()
    """which checks: ioi and greater-than (GPT-2 small), induction (Pythia-70m), e.g. ioi greater-than (default: all)"""

    trials: int = 50
    """distinct prompt pairs of each, e.g. 100 (default: 50)"""

    def refuse_impossible(self) -> None:
        super().refuse_impossible()
        refuse_unknown("--only", self.only, CHECKS)
        if self.trials < FEWEST_KNOWN_TRIALS:
            raise UserError(f"--trials {format_whole(self.trials)}: at least {FEWEST_KNOWN_TRIALS} prompt pairs")


@dataclass(frozen=True, kw_only=True)
class WatchOptions(SeriesOptions):
    """Options of `headlapse watch`."""

    every: float | None = None
    """seconds from one look to the next, e.g. 60 (default: 10 for a directory, 300 for the hub)"""

    until: str | None = None
    """the checkpoint with which it ends, or the first after it where that never comes: a label, a step or tokens, e.g.
    checkpoint-1000 | 1000 | 2B (default: Ctrl-C ends it)"""

    then: Then = ()
    """another command for each checkpoint once it is cached, with its options, to the end of the line or the next
    --then, e.g. patch --subsets each (default: patch)"""

    @property
    def cached(self) -> CacheOptions:
        """What is done with the checkpoints that are there: cached, then patched where nothing else is said."""
        shared = {field.name: getattr(self, field.name) for field in fields(SeriesOptions)}
        return CacheOptions(**(shared | {"then": self.then or (PatchOptions(),)}))

    @property
    def seconds(self) -> float:
        """From one look to the next."""
        from .engine.checkpoints.series import is_path

        return self.every or (FOLDER_EVERY if is_path(self.model) else HUB_EVERY)

    def refuse_impossible(self) -> None:
        from .engine.checkpoints.series import demo_seed

        self.cached.refuse_impossible()
        if demo_seed(self.model) is not None:
            raise UserError(f"--model {self.model}: headlapse cache trains it to its end; name a training that goes on")
        if self.every is not None and not 0 < self.every < math.inf:
            raise UserError(f"--every {self.every}: write seconds above 0, e.g. 60")
        if moving := [word for word in self.checkpoints if word in _MOVING]:
            raise UserError(
                f"--checkpoints {moving[0]}: that changes while a training goes on; write labels, globs, a range or all"
            )


@dataclass(frozen=True)
class ReportOptions(StoreOption):
    """Options of `headlapse report`."""

    _: KW_ONLY

    out: Path | None = None
    """folder to write, e.g. cache/demo-decimal-report (default: <store>-report beside the store)"""

    name: str | None = None
    """which patched run, e.g. parity (default: the newest; the page lists them all)"""


@dataclass(frozen=True)
class CompareOptions:
    """Options of `headlapse compare`."""

    stores: tuple[Path, ...] = ()
    """two stores or more, patched alike, e.g. cache/pythia-160m-seed*-decimal.zarr"""

    _: KW_ONLY

    name: str | None = None
    """which patched run of every store, e.g. parity (default: the newest of each)"""

    out: Path | None = None
    """folder to write the page and its numbers into, e.g. seeds-report (default: comparison-report beside the first
    store)"""

    verbose: bool = False
    """print a line for every training run as well"""

    def refuse_impossible(self) -> None:
        """Raise `UserError` for what is no comparison."""
        if len(self.stores) < 2:
            given = f"{self.stores[0]} alone" if self.stores else "no store"
            raise UserError(f"compare was given {given}: name two stores or more (headlapse ls lists those there are)")


@dataclass(frozen=True)
class DoctorOptions(WeightsOption, StoreOption):
    """Options of `headlapse doctor`."""

    _: KW_ONLY

    model: str | None = None
    """instead of a store, what is served of a hub id such as EleutherAI/pythia-160m, asked for without a download, or
    the checkpoints of a directory"""

    fix: bool = False
    """remove what killed processes left"""

    def refuse_impossible(self) -> None:
        """Raise `UserError` for options that exclude one another."""
        self.refuse_missing_weights()
        given = {"--store": self.store is not None, "--weights": self.weights is not None, "--fix": self.fix}
        if self.model is not None and any(given.values()):
            other = next(name for name, is_given in given.items() if is_given)
            raise UserError(f"--model {self.model} and {other}: with --model no store is looked at; give one of them")


def shard_of(labels: Sequence[str]) -> str:
    """The share of a job: its labels themselves, whatever else is missing by the time it begins."""
    return json.dumps(list(labels))


def _labels_in(shard: str) -> list[str] | None:
    try:
        return list(parse_json(shard)) if shard.startswith("[") else None
    except ValueError:
        return None


def parse_seeds(words: str) -> list[int]:
    """`1-9`, `1,2,5` as numbers.  Raises `UserError` where it cannot be read."""
    seeds: list[int] = []
    for word in words.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", word, re.ASCII)
        if match is None or (first := int(match[1])) > (last := int(match[2] or match[1])):
            raise UserError(f"--seeds {words}: write numbers and ranges, e.g. 1-9 or 1,2,5")
        if last - first >= MOST_SEEDS:
            raise UserError(f"--seeds {words}: {last - first + 1:,} seeds; at most {MOST_SEEDS} at once")
        seeds += range(first, last + 1)
    return list(dict.fromkeys(seeds))


def refuse_unknown(option: str, words: Sequence[str], known: Sequence[str]) -> None:
    """Raise `UserError` for a word that is none of those an option takes; the command line has checked already."""
    for word in words:
        if word not in known:
            raise UserError(f"{option} {word}: not known; write some of {', '.join(known)}")


def refuse_bad_name(name: str) -> None:
    """Raise `UserError` for what cannot be the name of a patched run, which is a folder's."""
    if not re.fullmatch(r"[\w+=-][\w.+=-]{0,99}", name) or len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(f"--name {name!r}: a name is a word of letters, digits and . _ + = -, of 100 at most")
    if name in _TAKEN_NAMES or name.startswith("__") or name.endswith((".partial", ".gone", ".lock")):
        raise UserError(f"--name {name}: a store keeps files of its own under such names; choose another")


def refuse_bad_store(store: Path) -> None:
    """Raise `UserError` for what can be no store's path, whatever is on the disk."""
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(store)):
        raise UserError(f"--store {store}: a store lies in a folder of this machine, not at a URL; give a path")
    if "\0" in str(store) or len(os.fsencode(store.name)) > LONGEST_NAME:
        raise UserError(f"--store {store}: no folder can have that name; give one of at most {LONGEST_NAME} bytes")
    for folder in store.absolute().parents:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--store {store}: {folder} is a file, no folder; give another path")

"""Design of the comparison: one factor at a time around a base point, and the crosses that defaults need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

from distriray.config import (
    MIXES,
    PAPER,
    ExchangeMode,
    Freshness,
    Mix,
    ParallelConfig,
    Prediction,
    Weight,
    Width,
)
from distriray.steps import SchedulerName

PATCHES = (2, 4, 8)
SCHEDULERS: tuple[SchedulerName, ...] = ("ddim", "euler", "dpmpp-2m")
STEPS = (10, 20, 50)
CONVERGED = 200  # steps of a schedule that shorter ones are compared with
SHORT_STEPS = "short steps"  # a question for transformers alone
SHOWN = 5  # pictures of a row of the figure


@dataclass(frozen=True)
class Setting:
    """One way to make the pictures. One patch is a single device: the model as diffusers runs it.

    Attributes:
        against: the scheduler of one device's pictures of `CONVERGED` steps, which these are compared with;
            None for one device's of the same scheduler and steps.
    """

    patches: int = 4
    steps: int = 20
    scheduler: SchedulerName = "ddim"
    exchange: ExchangeMode | Mix = "displaced"
    warmup: int | Literal["auto"] = 4
    statistics: Weight = 0.0
    halos: Weight = 0.0
    keys_values: float = 0.0
    cfg_parallel: bool = False
    cache_interval: int = 1
    against: SchedulerName | None = None

    @property
    def config(self) -> ParallelConfig:
        return ParallelConfig(
            exchange=self.exchange,
            warmup_steps=self.warmup,
            prediction=Prediction(statistics=self.statistics, halos=self.halos, keys_values=self.keys_values),
            cfg_parallel=self.cfg_parallel,
            cache_interval=self.cache_interval,
            parallel_vae=False,  # one device decodes all latents
        )

    @property
    def ranks(self) -> int:
        return self.patches * (2 if self.cfg_parallel else 1)

    @property
    def alone(self) -> Setting:
        """The same picture by one device, which this one is compared with."""
        if self.against is not None:
            return Setting(patches=1, steps=CONVERGED, scheduler=self.against)
        return Setting(patches=1, steps=self.steps, scheduler=self.scheduler)

    @property
    def plain(self) -> Setting:
        """The base method with as many patches and steps: all stale, warm-up 4, no prediction."""
        return Setting(patches=self.patches, steps=self.steps, scheduler=self.scheduler)

    @property
    def method(self) -> str:
        """The exchange in words, without patches, steps and scheduler."""
        cached = f", one of {self.cache_interval} steps whole" if self.cache_interval > 1 else ""
        if self.patches == 1:
            converged = f", against {CONVERGED} steps {self.against}" if self.against else ""
            return f"one device{cached}{converged}"
        words: list[str] = [self.exchange] if isinstance(self.exchange, str) else _words(self.exchange)
        if not (self.config.mix is None or self.config.mix.exact):
            words.append(f"warm-up {self.warmup}")
            weights: dict[str, Weight] = {
                "statistics": self.statistics,
                "halos": self.halos,
                "keys and values": self.keys_values,
            }
            words += [
                f"{kind} {weight if isinstance(weight, str) else format(weight, 'g')}"
                for kind, weight in weights.items()
                if weight
            ]
        if self.cfg_parallel:
            words.append("guidance split")
        return ", ".join(words) + cached

    @property
    def name(self) -> str:
        """Unique among settings, and fit for a file name."""
        where = f"{self.patches} patches, {self.steps} steps {self.scheduler}, {self.method}"
        return where.replace(", ", "_").replace(" ", "-")


def _words(mix: Mix) -> list[str]:
    """What is not fresh and whole."""
    kinds = {"statistics": "whole", "halos": mix.halos_width, "keys_values": mix.keys_values_width}
    words = []
    for kind, width in kinds.items():
        how = [word for word in (getattr(mix, kind), width) if word not in ("fresh", "whole")]
        words += [" ".join((*how, kind.replace("_", " and ")))] if how else []
    return words


@dataclass(frozen=True)
class Section:
    """Settings that answer one question, on the first `count` prompts."""

    title: str
    settings: tuple[Setting, ...]
    count: int


Rows = Callable[[Setting], tuple[Setting, ...]]


BASE = Setting()
PREDICTIONS: tuple[dict[str, float], ...] = (
    {"statistics": 0.5},
    {"statistics": 0.75},
    {"halos": 0.5},
    {"keys_values": 0.5},
    {"statistics": 0.5, "halos": 0.5},
    {"statistics": 0.5, "halos": 0.5, "keys_values": 0.5},
)
WEIGHTS: tuple[dict[str, float], ...] = (
    {"statistics": 0.25},
    {"statistics": 1.0},
    {"halos": 0.25},
    {"halos": 1.0},
)
EIGHT = replace(BASE, patches=8)
METHODS: tuple[Setting, ...] = (
    BASE,
    replace(BASE, exchange=PAPER),
    replace(BASE, statistics=0.5),
    replace(BASE, statistics=0.75),
)


def _by_default(base: Setting, exchange: ExchangeMode | Mix) -> Setting:
    """This exchange with the warm-up and the extrapolation that it has by default."""
    config = ParallelConfig(exchange=exchange)
    assert config.mix is not None
    weights = config.prediction.weights(config.mix)
    return replace(base, exchange=exchange, warmup=config.warmup_of(config.mix), **weights._asdict())


PICTURED: dict[str, Setting] = {
    "one device": BASE.alone,
    "eight patches that do not talk": replace(EIGHT, exchange="none"),
    "DistriFusion: after four steps, all that peers send is one step old": replace(EIGHT, exchange=PAPER),
    "after four steps, only keys and values are old": _by_default(EIGHT, "displaced_attention"),
}
"""The rows of the figure, in words."""


def sections(full: int, half: int, few: int) -> list[Section]:
    """All that is measured, the most important first: on `full`, `half` or `few` prompts.

    Every row of the table says on how many.
    """
    return [
        Section("one device", (BASE.alone,), full),
        Section("exchange", (replace(BASE, exchange="none"), BASE), full),
        *_columns("mixes", full, _mixes, (4, 8)),
        *_columns("mixes", half, _mixes, (2,)),
        *_columns("warm-up of mixes", few, _mix_warmups, PATCHES),
        *_columns("extrapolated keys and values", few, _extrapolated, (4, 8, 2)),
        *_columns("extrapolated keys and values", few, _extrapolated_in_few_steps, (4, 8)),
        *_columns("fitted extrapolation", few, _fitted, (8, 4, 2)),
        *_columns("fitted extrapolation", few, lambda base: _fitted(replace(base, steps=10)), (8, 4)),
        *_columns("fitted extrapolation", few, _fitted_beside_fresh_halos, (8, 4)),
        *_columns("kinds", few, _kinds, (4, 8)),
        *_columns("widths", few, _widths, (4,)),
        *_columns("mixes and steps", few, _mix_steps, (4, 8)),
        *_columns("mixes and schedulers", few, _mix_schedulers, (4,)),
        Section("few steps", tuple(_few_steps()), few),
        Section(SHORT_STEPS, tuple(_short_steps()), few),
        *_columns(SHORT_STEPS, few, _short_steps_of_gangs, (8,)),
        *_columns("exchange", half, lambda base: (replace(base, exchange="none"), base), (2, 8)),
        *_columns("exchange", few, lambda base: (replace(base, exchange="sync"),), PATCHES),
        *_columns("warm-up", full, _warmups, (4,)),
        Section("group norm", (BASE, replace(BASE, exchange=PAPER)), full),
        Section("prediction", _predictions(BASE, PREDICTIONS[:1]), full),
        *_columns("group norm", half, _group_norms, (4, 8)),
        *_columns("prediction", half, lambda base: _predictions(base, PREDICTIONS), (4, 8)),
        *_columns("warm-up", half, _warmups, (8,)),
        *_columns("automatic warm-up", few, lambda base: (replace(base, warmup="auto"),), (4, 8)),
        Section("guidance split", (replace(BASE, cfg_parallel=True),), few),
        Section("steps", tuple(_crosses(PATCHES, STEPS, ("ddim",))), few),
        Section("schedulers", tuple(_crosses(PATCHES, (20,), SCHEDULERS)), few),
        *_columns("weights", few, lambda base: _predictions(base, WEIGHTS), (8, 4, 2)),
        Section("steps and schedulers", tuple(_crosses((8,), (10, 50), SCHEDULERS[1:])), few),
        *_columns(
            "automatic warm-up",
            few,
            lambda base: tuple(replace(base, warmup="auto", steps=steps) for steps in (10, 50)),
            (4,),
        ),
        Section("warm-up of few steps", tuple(replace(EIGHT, steps=10, warmup=n) for n in (1, 2)), few),
        *_columns("warm-up as by default", few, _default_warmups, PATCHES),
        Section("in pictures", tuple(PICTURED.values()), min(full, SHOWN)),
    ]


def by_schedulers(
    sections: Iterable[Section], base: SchedulerName, known: Collection[SchedulerName]
) -> list[Section]:
    """The same by another base scheduler, for a model that takes those `known`.

    Rows that compare schedulers of gangs are left out.
    """
    if base == BASE.scheduler:
        return [*sections]
    others: list[Section] = []
    for section in sections:
        settings = tuple(
            _by(base, each)
            for each in section.settings
            if each.scheduler == BASE.scheduler or (each.patches == 1 and each.scheduler in known)
        )
        others += [replace(section, settings=settings)] if settings else []
    return others


def quick(count: int) -> list[Section]:
    """A trial of the command: one row of each kind."""
    few_steps = replace(BASE, steps=5, warmup=1)
    methods = (
        replace(few_steps, exchange="none"),
        few_steps,
        replace(few_steps, exchange=PAPER),
        replace(few_steps, statistics=0.5),
        replace(few_steps, exchange="sync"),
    )
    return [
        Section("one device", (few_steps.alone,), count),
        Section("exchange", methods, count),
        Section("automatic warm-up", (replace(few_steps, warmup="auto"),), count),
    ]


def _columns(title: str, count: int, rows: Rows, patches: Iterable[int]) -> Iterator[Section]:
    for number in patches:
        yield Section(title, rows(replace(BASE, patches=number)), count)


def _warmups(base: Setting) -> tuple[Setting, ...]:
    return tuple(replace(base, warmup=steps) for steps in (0, 1, 2, 4, 8))


def _default_warmups(base: Setting) -> tuple[Setting, ...]:
    return tuple(replace(_by_default(base, "displaced"), warmup=steps) for steps in (1, 2, 4, 8))


def _mixes(base: Setting) -> tuple[Setting, ...]:
    """The paper's method and the mixes with a name that differ from one device, as they are by default."""
    mixes: tuple[ExchangeMode | Mix, ...] = (PAPER, "displaced", "displaced_attention", "compressed")
    return tuple(_by_default(base, mix) for mix in mixes)


def _mix_warmups(base: Setting) -> tuple[Setting, ...]:
    methods = _mixes(base)
    return tuple(replace(method, warmup=steps) for steps in (1, 2, 4) for method in methods)


def _extrapolated(base: Setting) -> tuple[Setting, ...]:
    """Old keys and values by their weight, behind few synchronous steps and more."""
    return tuple(
        replace(base, exchange="displaced_attention", warmup=steps, keys_values=weight)
        for steps in (2, 4)
        for weight in (0.0, 0.5, 0.75, 1.0)
    )


def _extrapolated_in_few_steps(base: Setting) -> tuple[Setting, ...]:
    """Of few steps, four are a large part: two behind which old values are extrapolated less, or four."""
    return tuple(
        replace(base, exchange="displaced_attention", steps=steps, warmup=warmup, keys_values=weight)
        for steps in (8, 10)
        for warmup, weight in ((2, 0.5), (4, 0.5), (4, 0.75))
    )


def _fitted(base: Setting) -> tuple[Setting, ...]:
    """Old statistics and halos by one weight for all layers, and by one for each."""
    weights: tuple[Weight, ...] = (0.0, 0.5, 0.75, "fitted")
    both = replace(base, statistics="fitted", halos="fitted")
    return *(replace(base, statistics=weight) for weight in weights), both


def _fitted_beside_fresh_halos(base: Setting) -> tuple[Setting, ...]:
    mix = Mix(statistics="stale", keys_values="stale")
    return tuple(replace(each, exchange=mix) for each in _fitted(base)[:-1])


def _mix_steps(base: Setting) -> tuple[Setting, ...]:
    return tuple(method for steps in (4, 8, 10, 50) for method in _mixes(replace(base, steps=steps)))


def _mix_schedulers(base: Setting) -> tuple[Setting, ...]:
    return tuple(method for name in SCHEDULERS[1:] for method in _mixes(replace(base, scheduler=name)))


def _few_steps() -> Iterator[Setting]:
    """One device by fewer steps than make its picture converge, of several schedulers."""
    for scheduler in (*SCHEDULERS, "unipc"):
        for steps in (10, 14, 20, 28):
            yield Setting(patches=1, steps=steps, scheduler=scheduler, against=BASE.scheduler)


def _short_steps() -> Iterator[Setting]:
    """One device that computes one of two or three steps whole, against itself and against many steps."""
    schedulers: tuple[SchedulerName, ...] = (BASE.scheduler, "unipc")
    for scheduler in schedulers:
        for steps in (20, 28, 50):
            for interval in (2, 3):
                short = Setting(patches=1, steps=steps, scheduler=scheduler, cache_interval=interval)
                yield short
                yield replace(short, against=BASE.scheduler)


def _short_steps_of_gangs(base: Setting) -> tuple[Setting, ...]:
    """Gangs whose whole steps are displaced behind short ones, beside those without any."""
    mixes: tuple[ExchangeMode, ...] = ("displaced", "displaced_attention")
    methods = (_by_default(replace(base, steps=28), mix) for mix in mixes)
    return tuple(replace(each, cache_interval=interval) for each in methods for interval in (1, 2, 3))


def _by(base: SchedulerName, setting: Setting) -> Setting:
    scheduler = base if setting.scheduler == BASE.scheduler else setting.scheduler
    return replace(setting, scheduler=scheduler, against=setting.against and base)


def _kinds(base: Setting) -> tuple[Setting, ...]:
    """What each kind of stale value costs, alone and with another."""
    stale: Freshness = "stale"
    kinds = ("statistics", "halos", "keys_values")
    some = [each for count in (1, 2) for each in combinations(kinds, count)]
    mixes = [Mix(**dict.fromkeys(each, stale)) for each in some]  # type: ignore[arg-type]
    return tuple(replace(base, exchange=mix) for mix in mixes)


def _widths(base: Setting) -> tuple[Setting, ...]:
    """How few bits do."""
    widths: tuple[Width, ...] = ("int8", "int4", "int2")
    mixes = [
        *(Mix(keys_values_width=width) for width in widths),
        *(Mix(halos_width=width, keys_values_width="int4") for width in widths),
        Mix(keys_values="stale", keys_values_width="int4"),
    ]
    return tuple(_by_default(base, mix) for mix in mixes)


def _group_norms(base: Setting) -> tuple[Setting, ...]:
    displaced = MIXES["displaced"]
    others = (displaced.model_copy(update={"statistics": kind}) for kind in ("corrected", "fresh", "local"))
    return base, *(replace(base, exchange=mix) for mix in others)


def _predictions(base: Setting, weights: tuple[dict[str, float], ...]) -> tuple[Setting, ...]:
    return tuple(Setting(patches=base.patches, **kinds) for kinds in weights)  # type: ignore[arg-type]


def _crosses(
    patches: Iterable[int], steps: Iterable[int], schedulers: Iterable[SchedulerName]
) -> Iterator[Setting]:
    steps, schedulers = tuple(steps), tuple(schedulers)
    for number in patches:
        for count in steps:
            for scheduler in schedulers:
                for method in METHODS:
                    yield replace(method, patches=number, steps=count, scheduler=scheduler)

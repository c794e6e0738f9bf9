"""Configuration of a gang's denoising, frozen and validated."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

ExchangeMode = Literal["auto", "displaced", "displaced_attention", "compressed", "sync", "none"]
Kind = Literal["statistics", "halos", "keys_values"]
KINDS: frozenset[Kind] = frozenset(get_args(Kind))
StatisticsMode = Literal["stale", "corrected", "fresh", "local"]
Freshness = Literal["stale", "fresh"]
Width = Literal["whole", "int8", "int4", "int2"]
AttentionMode = Literal["auto", "gather", "ulysses"]

WHOLE_AT_FIRST = 3
"""Steps at the start of an image that are never short: in these it changes most."""
GUESSED_AUTO_WARMUP = 4
"""Steps that `warmup_steps="auto"` is taken for before an image has shown how long it warms up."""

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Fraction | Literal["fitted"]


class Mix(BaseModel):
    """Freshness by kind: which of the peers' activations a displaced step waits for, and which are old.

    Attributes:
        statistics: whose statistics a group norm uses: the peers' previous ones (`stale`), those shifted by
            this rank's own change (`corrected`, as in the paper), `fresh` ones, or only its own (`local`).
        halos: the rows around a patch, which convolutions read.
        keys_values: of self-attention.
        halos_width, keys_values_width: what is sent of them in a displaced step: all (`whole`), or the change
            since what the receivers have, in numbers of that many bits, whose error is made up for by the
            next step's change. Halos need to be fresh for that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statistics: StatisticsMode = "fresh"
    halos: Freshness = "fresh"
    keys_values: Freshness = "fresh"
    halos_width: Width = "whole"
    keys_values_width: Width = "whole"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.halos == "stale" and self.halos_width != "whole":
            raise ValueError("stale halos are sent whole; halos_width is for fresh ones")
        return self

    def bits(self, kind: Literal["halos", "keys_values"]) -> int | None:
        """Of a number of this kind's changes; None where values are sent whole."""
        width = self.halos_width if kind == "halos" else self.keys_values_width
        return None if width == "whole" else int(width.removeprefix("int"))

    def is_stale(self, kind: Kind) -> bool:
        """Whether displaced steps read values of this kind that were sent one step ago."""
        return getattr(self, kind) in ("stale", "corrected")

    @property
    def fresh_keys_values(self) -> bool:
        """Whether keys and values are fresh, and travel whole."""
        return self.keys_values == "fresh" and self.keys_values_width == "whole"

    @property
    def exact(self) -> bool:
        """Whether all values are fresh and the gang's numbers are one device's."""
        return self == Mix()


MIXES: Mapping[str, Mix] = MappingProxyType(
    {
        "displaced": Mix(statistics="stale", halos="stale", keys_values="stale"),
        "displaced_attention": Mix(keys_values="stale"),
        "compressed": Mix(keys_values_width="int4"),
        "sync": Mix(),
    }
)
"""The mixes that have a name."""

PAPER = Mix(statistics="corrected", halos="stale", keys_values="stale")
"""DistriFusion's own: `displaced` with corrected statistics."""


class Weights(NamedTuple):
    """Extrapolation weights of each kind of stale value."""

    statistics: Weight = 0.0
    halos: Weight = 0.0
    keys_values: float = 0.0


class Prediction(BaseModel):
    """Extrapolation weights w of stale values: last + w * (last - one before). 0 turns a kind off.

    `fitted` gives each layer and each peer a weight of its own: that with which the image's changes from step
    to step so far would have followed from those before. It is 0 until three steps came before.

    Attributes:
        statistics: of group norm's statistics; `auto` is `fitted` of `stale` ones, and 0 of `corrected` ones.
        halos: of the rows around a patch; `auto` is `fitted`, and 0 beside `corrected` statistics, for these
            are the paper's method.
        keys_values: of self-attention's keys and values; `auto` is 0.75 where they are stale and
            statistics and halos fresh, else 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statistics: Weight | Literal["auto"] = "auto"
    halos: Weight | Literal["auto"] = "auto"
    keys_values: Fraction | Literal["auto"] = "auto"

    def weights(self, mix: Mix) -> Weights:
        """What `auto` stands for, for that mix."""
        statistics, halos, keys_values = self.statistics, self.halos, self.keys_values
        if statistics == "auto":
            statistics = "fitted" if mix.statistics == "stale" else 0.0
        if halos == "auto":
            halos = "fitted" if mix.halos == "stale" and mix.statistics != "corrected" else 0.0
        if keys_values == "auto":
            alone = mix.statistics == mix.halos == "fresh" and mix.keys_values == "stale"
            keys_values = 0.75 if alone else 0.0
        return Weights(statistics, halos, keys_values)


class ParallelConfig(BaseModel):
    """The way in which the ranks of a gang share one denoising step.

    Attributes:
        exchange: `auto` draws a first image of a shape in `sync`, and later ones in the freshest of `sync`,
            `displaced_attention` and `displaced` in which messages cost at most `max_wait` of a step, or in
            `sync` where there is no room for that one's buffers.
            `displaced` uses the other patches' activations of the previous step (Li et al., CVPR
            2024); `displaced_attention` does so for self-attention's keys and values alone; `compressed`
            waits for those too, as changes of 4 bits; `sync` exchanges fresh ones at every layer and gives
            one device's numbers; `none` exchanges nothing but the output, the naive baseline. Or a `Mix`.
        attention: how ranks attend to one another's tokens where keys and values are fresh and whole in every
            step: `gather` sends those of all heads to everybody; `ulysses` deals the heads to the ranks that
            share an image, which sends 2/n of that among n ranks, in two messages a layer, and needs as many
            heads as ranks (Jacobs et al. 2023, arXiv 2309.14509). Where n does not divide them the first
            ranks get one more. `auto` deals those of each layer where that sends less and no rank gets more
            than 1.25 times its share. Both are exact. Where keys and values are old in some steps, or come in
            few bits, they are gathered in all.
        max_wait: largest share of a step that sending fresh values and waiting for them may take, for `auto`.
        warmup_steps: synchronous steps at the start of every image (the first one always is), or `auto`:
            until the drift of what is sent falls below `auto_warmup_drift`. None is as many as the mix needs:
            4 where anything is stale, and 1 where nothing is; so is `auto` where neither keys and values nor
            statistics are.
        auto_warmup_drift: relative change between two steps of stale keys and values, or of stale statistics
            where keys and values are fresh; largest over ranks.
        prediction: extrapolation of stale values.
        cache_interval: of so many steps of a transformer, one computes all blocks, and the others are short:
            these compute the first block, and add what the other blocks added in the last whole step. With 1
            every step is whole, as are the first three of an image, and those with ControlNets or with
            IP-Adapters of a request. U-Nets refuse others.
        cfg_parallel: give each half of an even gang one half of the batch: with classifier-free guidance
            the unconditional and the conditional pass, in one call of the network or one each. `auto` does so
            whenever there are halves, True refuses what has none, and False never does.
        parallel_vae: the ranks decode the picture together, each its own rows, exactly; all of them must ask
            for the picture then. Otherwise, and where the VAE cannot be cut, every rank that asks
            for it decodes all of it: in hosts rank 0 alone.
        cuda_graphs: on a GPU, launch a step that was met before as a few CUDA graphs rather than kernel by
            kernel; elsewhere nothing changes.
        max_buffer_bytes: bound on exchange buffers kept for shapes and gangs not in use.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    exchange: ExchangeMode | Mix = "auto"
    attention: AttentionMode = "auto"
    max_wait: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    warmup_steps: Annotated[int, Field(ge=0)] | Literal["auto"] | None = None
    auto_warmup_drift: Annotated[float, Field(gt=0.0)] = 0.12
    prediction: Prediction = Prediction()
    cache_interval: Annotated[int, Field(ge=1, le=100)] = 1
    cfg_parallel: bool | Literal["auto"] = "auto"
    parallel_vae: bool = True
    cuda_graphs: bool = True
    max_buffer_bytes: Annotated[int, Field(ge=0)] = 4 * 2**30

    @property
    def mix(self) -> Mix | None:
        """The mix of displaced steps; None for `none`, and for `auto`."""
        if isinstance(self.exchange, Mix):
            return self.exchange
        return MIXES.get(self.exchange)

    @property
    def first_mix(self) -> Mix | None:
        """The mix of a gang's first image of a shape, which `auto` measures; None for `none`."""
        return MIXES["sync"] if self.exchange == "auto" else self.mix

    def warmup_of(self, mix: Mix) -> int | Literal["auto"]:
        """Synchronous steps at the start of an image with that mix."""
        measured = mix.is_stale("keys_values") or mix.is_stale("statistics")
        if self.warmup_steps is None or (self.warmup_steps == "auto" and not measured):
            return 4 if any(map(mix.is_stale, KINDS)) else 1
        return self.warmup_steps

    @property
    def usual_warmup(self) -> int:
        """Synchronous steps at the start of an image, as far as can be said before it is drawn.

        Where some steps are short, the first ones, which never are, whichever of the others are synchronous.
        """
        if self.cache_interval > 1:
            return WHOLE_AT_FIRST
        steps = self.warmup_of(self.mix or MIXES["displaced"])
        return GUESSED_AUTO_WARMUP if steps == "auto" else max(1, steps)

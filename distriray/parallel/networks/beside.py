"""ControlNets beside a transformer, which are cut to the same tokens and exchange in the same steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from torch import nn

from distriray.errors import UnsupportedModel
from distriray.parallel.context import PatchContext
from distriray.parallel.exchange.step import Step
from distriray.parallel.layers.tokens import Tokens
from distriray.parallel.networks.base import Call
from distriray.parallel.networks.controls import Residuals, UsedControl, check_cut
from distriray.parallel.networks.local import LocalCode
from distriray.parallel.share import Share

ARGUMENT = "residuals"
"""What a call's arguments call its `Asked`, or the `Shown` of a graph."""


@dataclass(frozen=True, eq=False)
class Asked:
    """The ControlNets of a call.

    Attributes:
        residuals: of its step.
        due: those that the call runs.
        by: the arguments of the transformer that they go by in place of the call's own, where they run with
            another branch of guidance.
        text: the tokens of its text; None where it is the call's own.
    """

    residuals: Residuals
    due: Sequence[UsedControl]
    by: Mapping[str, Any] = field(default_factory=dict)
    text: int | None = None


class Shown(NamedTuple):
    """The ControlNets of a call as inputs of a graph.

    Attributes:
        pictures: by the name of each its picture, of this rank's part of the batch, scale and mode.
        by, text: as of `Asked`.
    """

    pictures: dict[str, list[Any]]
    by: Mapping[str, Any]
    text: int | None


NOTHING = Asked(Residuals(()), ())


class CutControl(Protocol):
    """A ControlNet that is cut into patches, as `token_control.TokenControl` is."""

    module: Any

    def __init__(self, module: Any, local: LocalCode | None = None, tokens: Tokens | None = None) -> None: ...

    @property
    def key_heads(self) -> Set[int]: ...

    def convert(self, context: PatchContext) -> bool: ...

    def dry_run(self, call: Call, share: Share, step: Step) -> None: ...

    def output(self, share: Share, given: dict[str, Any]) -> Any: ...

    @classmethod
    def residuals_of(
        cls,
        transformer: Any,
        controls: Sequence[UsedControl],
        given: Mapping[str, Any],
        run: Callable[[str, dict[str, Any]], Any],
    ) -> dict[str, Any]: ...


class Beside:
    """The ControlNets of one transformer.

    Args:
        kind: those of its family; None where it has none that are cut into patches with it.
        tokens: of the transformer, which begin anew for each of them: some have layers of it.
    """

    def __init__(self, kind: type[CutControl] | None, tokens: Tokens) -> None:
        self._kind, self._tokens = kind, tokens
        self._controls: dict[str, CutControl] = {}

    @property
    def key_heads(self) -> Set[int]:
        """`Network.key_heads` of all."""
        return frozenset[int]().union(*(control.key_heads for control in self._controls.values()))

    def convert(self, controls: Mapping[str, nn.Module], local: LocalCode, context: PatchContext) -> bool:
        """`Network.convert` of those that calls may name, by name."""
        before, self._controls, converted = self._controls, {}, False
        for name, module in controls.items():
            if self._kind is None:
                raise UnsupportedModel(f"the ControlNet {name!r}, of a family that has none cut into patches")
            known = next((each for each in before.values() if each.module is module), None)
            self._controls[name] = before[name] = known or self._kind(module, local, self._tokens)
            converted |= self._controls[name].convert(context)
        return converted

    @staticmethod
    def read(call: Call, residuals: Residuals, controls: Mapping[str, nn.Module]) -> Call:
        """A call of the transformer, as one with some of `controls`; raises UnsupportedModel."""
        check_cut(residuals.controls, controls)
        asked = Asked(residuals, residuals.due)
        what = "{}" if asked.due else "residuals of {}"
        names = tuple(what.format(control.name) for control in residuals.controls)
        return replace(call, arguments={**call.arguments, ARGUMENT: asked}, besides=names or None)

    @staticmethod
    def apart(calls: Sequence[Call]) -> Sequence[Call]:
        """`Network.apart`: each runs the ControlNets of the step itself, as the first one would.

        What these exchange goes by the first one's text, of which a call's own text says nothing.
        """
        first = calls[0]
        controls = Beside.of(first)
        if not controls:
            return calls
        besides = first.besides, first.text.shape[1]
        return [
            replace(
                call,
                arguments={**call.arguments, ARGUMENT: _as_in(first, call, controls)},
                besides=besides,
            )
            for call in calls
        ]

    @staticmethod
    def of(call: Call) -> Sequence[UsedControl]:
        """Those that a call names."""
        asked: Asked = call.arguments.get(ARGUMENT, NOTHING)
        return asked.residuals.controls

    def dry_run(self, call: Call, share: Share, step: Step) -> None:
        """`Network.dry_run` of those that a call runs."""
        asked: Asked = call.arguments.get(ARGUMENT, NOTHING)
        for control in asked.due:
            own = _with_text(share, asked.text)
            self._controls[control.name].dry_run(replace(call, arguments={}), own, step)

    def run_in(self, call: Call) -> Sequence[nn.Module]:
        """Those that a call runs, if nothing that they make is for another call, as none of a graph is."""
        asked: Asked = call.arguments.get(ARGUMENT, NOTHING)
        return [] if asked.residuals.for_others else [each.network for each in asked.due]

    def as_inputs(self, call: Call, arguments: dict[str, Any], share: Share) -> None:
        """Let a graph have what those of a call go by as inputs, if it may be one (`run_in`)."""
        if self.run_in(call):
            asked: Asked = arguments[ARGUMENT]
            pictures = {name: shown for name, _, *shown in self._shown(asked.due, share)}
            arguments[ARGUMENT] = Shown(pictures, asked.by, asked.text)

    def added(self, transformer: Any, arguments: dict[str, Any], share: Share) -> Mapping[str, Any]:
        """Arguments for what those of a call add to this rank's tokens.

        Args:
            arguments: of the transformer, of this rank's part of the batch; `ARGUMENT` is taken out.
        """
        asked: Asked | Shown | None = arguments.pop(ARGUMENT, None)
        kind = self._kind
        if asked is None or kind is None:
            return {}
        own, arguments = _with_text(share, asked.text), {**arguments, **asked.by}

        def run(name: str, given: dict[str, Any]) -> Any:
            return self._controls[name].output(own, given)

        def make(controls: Sequence[UsedControl]) -> Mapping[str, Any]:
            return kind.residuals_of(transformer, controls, arguments, run)

        if isinstance(asked, Asked):
            return asked.residuals.made_by(lambda due: make(self._shown(due, share)))
        shown = asked.pictures.items()
        return make([UsedControl(name, self._controls[name].module, *each) for name, each in shown])

    @staticmethod
    def _shown(controls: Sequence[UsedControl], share: Share) -> list[UsedControl]:
        """The same with pictures of this rank's part of the batch."""
        return [control.for_batch(share.batch, share.cut) for control in controls]


def _as_in(first: Call, call: Call, controls: Sequence[UsedControl]) -> Asked:
    """The ControlNets of a call that runs them as another of its step would."""
    own = call.arguments
    by = {name: value for name, value in first.arguments.items() if value is not own[name]}
    by.pop(ARGUMENT, None)
    return Asked(Residuals(controls), controls, by, first.text.shape[1] if by else None)


def _with_text(share: Share, tokens: int | None) -> Share:
    """A rank's share where the text that is dealt has that many tokens."""
    if tokens is None or not share.tokens.text:
        return share
    return replace(share, partition=replace(share.tokens, text=tokens))

"""The models on offer, as OpenAI's clients list them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter
from pydantic import BaseModel, create_model

from deployments.http.openapi import errors
from distriray.errors import ModelNotFound
from distriray.service import ModelCard, Service

if TYPE_CHECKING:

    class _OfCard(BaseModel):
        pass
else:
    _FIELDS = {name: (field.annotation, ...) for name, field in ModelCard.model_fields.items()}
    _OPENAIS = {"id": _FIELDS["id"], "object": (Literal["model"], "model")}
    _OfCard = create_model("_OfCard", **{**_OPENAIS, **_FIELDS})


class Model(_OfCard):
    """A model; beside OpenAI's fields its own size (`WxH`, null until a host was up), the unit of all sizes,
    its limits, the gangs that can draw it, the fields that it refuses and why, what it is drawn with unless a
    request says otherwise, the adapters, ControlNets and IP-Adapters that requests may name, and the model
    that this is another name of, or null."""

    default_size: str | None

    @classmethod
    def of(cls, card: ModelCard) -> Model:
        """A card as it is answered: all of it, with the size in OpenAI's words."""
        size = card.default_size
        return cls.model_validate({**dict(card), "default_size": size and f"{size[1]}x{size[0]}"})


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[Model]


def model_routes(service: Service) -> APIRouter:
    """The models that `service` has."""
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", responses=errors(401, 500), summary="All models")
    async def list_models() -> ModelList:
        return ModelList(data=[Model.of(card) for card in service.models()])

    @router.get("/v1/models/{model:path}", responses=errors(401, 404, 500), summary="One model")
    async def retrieve_model(model: str) -> Model:
        return Model.of(card_of(service, model))

    return router


def card_of(service: Service, model: str | None) -> ModelCard:
    """The card of a model by its id, of the first for None; raises ModelNotFound."""
    cards = service.models()
    for card in cards:
        if model in (None, card.id):
            return card
    names = ", ".join(card.id for card in cards)
    raise ModelNotFound(f"there is no model {str(model)[:200]!r}; there are {names}")

"""FLUX.3, the base and the one that was distilled, by diffusers' modular blocks up to the loop."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ClassifierFreeGuidance,
    Flux3AutoBlocks,
    Flux3DistilledAutoBlocks,
    Flux3DistilledModularPipeline,
    Flux3ModularPipeline,
)
from diffusers.modular_pipelines.flux3.before_denoise import (
    Flux3DistilledTextRoPEInputsStep,
    Flux3PrepareImageCondLatentsStep,
    Flux3PrepareLatentsStep,
)
from diffusers.modular_pipelines.flux3.encoders import (
    Flux3DistilledTextEncoderStep,
    Flux3ProcessImagesInputStep,
    Flux3VaeEncoderStep,
)
from diffusers.modular_pipelines.flux3.inputs import Flux3DistilledTextInputStep, Flux3ImageCondInputStep
from diffusers.modular_pipelines.modular_pipeline import PipelineState

from distriray.denoise.pipelines.base import Commission, TokenCount, tokens_in_chat
from distriray.denoise.pipelines.families.flux2 import TokensInRows
from distriray.denoise.pipelines.guidance import guided_calls
from distriray.denoise.state import DenoiseState
from distriray.errors import UnsupportedModel

TEXT_TOKENS = 8192
_SHOWN = "image_cond_hidden_states", "image_cond_ids"
"""What the network calls the tokens of references and their positions."""


class Flux3(TokensInRows):
    """The base: a call of the network for each branch of guidance.

    Prompts are read as they are: the pipeline's prompt upsampler is not asked. One at a time is encoded, by
    the blocks of the distilled pipeline, which are the base's for one branch.

    Attributes:
        blocks: the pipeline's by default; others may mean another recipe.
        distilled: whether the network takes the timestep that a step goes to.
    """

    kinds = (Flux3ModularPipeline,)
    blocks: type[Any] = Flux3AutoBlocks
    distilled = False

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        text = Flux3DistilledTextEncoderStep(), Flux3DistilledTextInputStep()
        self._read = *text, Flux3DistilledTextRoPEInputsStep()
        self._prepare_latents = Flux3PrepareLatentsStep()
        shown = Flux3ProcessImagesInputStep(), Flux3VaeEncoderStep(), Flux3ImageCondInputStep()
        self._show = *shown, Flux3PrepareImageCondLatentsStep()

    def around(self, kind: type, parts: dict[str, Any]) -> Any:
        # For both: the base's asks its guider whether there is a negative prompt.
        components = Flux3DistilledModularPipeline(blocks=Flux3DistilledAutoBlocks())
        components.update_components(**parts)
        return components

    def check(self) -> None:
        what = type(self.pipeline).__name__
        if _recipe(self.pipeline.blocks) != _recipe(self.blocks()):
            raise UnsupportedModel(
                f"{what} with blocks other than those of {self.blocks.__name__}, or changed ones"
            )
        super().check()
        if self.pipeline.transformer.config.flow_map != self.distilled:
            of = "without" if self.distilled else "with"
            raise UnsupportedModel(f"{what} around a Flux3Transformer2DModel {of} flow_map")
        guider = self.pipeline.components.get("guider")
        if self.guides and (type(guider) is not ClassifierFreeGuidance or guider.use_original_formulation):
            raise UnsupportedModel(f"{what} with a guider other than diffusers' ClassifierFreeGuidance")

    @property
    def guides(self) -> bool:
        return not self.distilled

    def tokens(self, text: str) -> list[TokenCount]:
        processor = self._plain.tokenizer
        around = processor.apply_chat_template(
            [{"role": "user", "content": ""}], tokenize=False, add_generation_prompt=True
        )
        return [tokens_in_chat(processor.tokenizer, text, around, TEXT_TOKENS)]

    def encode(self, commission: Commission) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for branch, prompt in self.prompts(commission).items():
            read = self.kept_texts.of(self._embedded, prompt, len(commission.generators))
            values |= {f"{branch}{name}": value for name, value in read.items()}
        return values

    def _embedded(self, prompt: str, images: int) -> dict[str, torch.Tensor]:
        """A prompt's embeddings, and the positions of its tokens."""
        read = self._run(
            *self._read, prompt=prompt, max_sequence_length=TEXT_TOKENS, num_images_per_prompt=images
        )
        return {name: read.get(name) for name in ("prompt_embeds", "txt_ids")}

    def noise(self, commission: Commission, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        drawn = self._run(
            self._prepare_latents,
            height=commission.height,
            width=commission.width,
            batch_size=1,
            num_images_per_prompt=len(commission.generators),
            generator=commission.generators,
            dtype=dtype,
        )
        values = {"latents": self.rows(drawn.get("latents"), commission), "img_ids": drawn.get("img_ids")}
        if not commission.references:
            return values
        shown = self._run(
            *self._show,
            image=list(commission.references),
            batch_size=1,
            num_images_per_prompt=len(commission.generators),
            dtype=dtype,
        )
        return {**values, **{name: shown.get(name) for name in _SHOWN}}

    def step(self, state: DenoiseState) -> tuple[torch.Tensor, torch.Tensor]:
        latents = state.latents
        tokens = latents.flatten(2).transpose(1, 2).to(self._transformer.dtype)
        outputs = self.outputs_of(state, lambda branch: self._arguments(state, branch, tokens))
        output = guided_calls(outputs, state.guidance_scale, state.guidance_rescale)
        output = output.transpose(1, 2).unflatten(2, latents.shape[2:])
        return self.advanced(state, output), output

    def _arguments(self, state: DenoiseState, branch: str, tokens: torch.Tensor) -> dict[str, Any]:
        """Arguments of the network, for the branch whose values begin with that."""
        values, target = state.values, {}
        timestep = self.timestep(state, state.batch)
        if self.distilled:
            to = self.following_timestep(state, state.batch)
            target = {"target_timestep": (to / 1000).to(tokens.dtype)}
        return {
            "hidden_states": tokens,
            "timestep": (timestep / 1000).to(tokens.dtype),
            "encoder_hidden_states": values[f"{branch}prompt_embeds"],
            "txt_ids": values[f"{branch}txt_ids"],
            "img_ids": values["img_ids"],
            **{name: values.get(name) for name in _SHOWN},
            **target,
        }

    def _run(self, *blocks: Any, **given: Any) -> PipelineState:
        """What blocks make of values by name, one after the other; they know the rest by default."""
        state = PipelineState()
        for name, value in given.items():
            state.set(name, value)
        for block in blocks:
            _, state = block(self._plain, state)
        return state


class Flux3Distilled(Flux3):
    """FLUX.3 that was distilled to few steps without guidance; its network knows where each step goes."""

    kinds = (Flux3DistilledModularPipeline,)
    blocks = Flux3DistilledAutoBlocks
    distilled = True


def _recipe(blocks: Any) -> Any:
    """The classes of blocks and their numbers, those of the prompt upsampler aside."""
    numbers = {name: value for name, value in vars(blocks).items() if isinstance(value, int | float)}
    inner = {name: _recipe(each) for name, each in blocks.sub_blocks.items() if name != "prompt_upsampler"}
    return type(blocks), numbers, inner

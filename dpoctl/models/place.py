"""Where a model is loaded, and how its weights are held there."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from . import precision, quantized
from .pretrained import Source, load_complete, load_shape


class Place(NamedTuple):
    """The device that a model is loaded on, and how it is held there.

    `frozen_in`: the compute dtype of a model that is not trained, whose weights are frozen, and held so (see
    `precision.hold`). `quantize`: 4bit or 8bit for its linear layers; weights that are quantised, here or by the
    checkpoint, go to the device `quantized_at` (None: `device`) at once. `apart`: an adapter stays apart from its base.
    """

    device: str | torch.device = "cpu"
    frozen_in: torch.dtype | None = None
    quantize: str | None = None
    quantized_at: str | torch.device | None = None
    apart: bool = False

    def options(self, source: Source) -> dict[str, Any]:
        """What `from_pretrained` needs for weights that are quantised."""
        method, device = quantized.method_of(source.folder), self.quantized_at or self.device
        if self.quantize is None:
            return {"device_map": {"": str(device)}} if method else {}
        if method:
            said = f"--quantize {self.quantize}: {source.path} is quantised already ({method})"
            raise InputError(said, hint="leave --quantize out")
        return quantized.loading_options(self.quantize, source.path, device)

    @property
    def shape_only(self) -> bool:
        """Whether the model is only a shape, for a rank that receives its shard of the weights later."""
        return str(self.device) == "meta"

    def moved(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model on its device, frozen where it is not trained; it is cast before it takes the device's memory."""
        if self.frozen_in is not None:
            model.requires_grad_(False)
            precision.hold(model, self.frozen_in)
        return model if quantized.is_quantized(model) else model.to(self.device)


def load_at(place: Place, auto_class: Any, source: Source, *, new_head: int | None = None) -> PreTrainedModel:
    """A model in float32 as `load_complete` loads it, or its shape on the device `meta`.

    Raises InputError as they do, and for the shape of a checkpoint that is quantised: its shards could not be filled.
    """
    if place.shape_only:
        if method := quantized.method_of(source.folder):
            said = f"{source.path}: its weights are quantised ({method}), which --parallel fsdp cannot shard"
            raise InputError(said, hint="--parallel ddp")
        return load_shape(auto_class, source, torch.float32, new_head=new_head)
    model = load_complete(auto_class, source, torch.float32, new_head=new_head, options=place.options(source))
    if place.quantize:
        quantized.describe(model, place.quantize)
    return model

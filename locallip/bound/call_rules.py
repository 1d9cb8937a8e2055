"""The rules for plain operations between the modules of a network."""

from __future__ import annotations

import torch
from torch import Tensor

from locallip.bound import plain
from locallip.bound.composites import Scaling
from locallip.bound.joins import Add, Concatenate
from locallip.bound.rules import Place, Reshape, rule
from locallip.bound.selection import Selection


@rule(plain.Affine)
def _affine(layer: plain.Affine, place: Place) -> Scaling:
    scale, shift = (_over_image(value, place) for value in (layer.scale, layer.shift))
    bias = None if isinstance(layer.shift, float) and layer.shift == 0 else shift
    return Scaling(scale, bias, place.position, place.shape)


def _over_image(value: float | Tensor, place: Place) -> Tensor:
    """With one dimension for each of an image's activations."""
    tensor = torch.as_tensor(value, dtype=place.like.dtype, device=place.like.device)
    return tensor.view(*[1] * (len(place.shape) - tensor.dim()), *tensor.shape)


@rule(plain.View)
def _view(layer: plain.View, place: Place) -> Reshape:
    return Reshape(layer.forward)


@rule(plain.Select)
def _select(layer: plain.Select, place: Place) -> Selection:
    return Selection.of(layer.places, place.position, place.shape, place.like)


@rule(plain.Add)
def _add(layer: plain.Add, place: Place) -> Add:
    return Add()


@rule(plain.Concatenate)
def _concatenate(layer: plain.Concatenate, place: Place) -> Concatenate:
    return Concatenate(layer.dim)

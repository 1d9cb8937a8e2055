"""What the public functions refuse before they compute anything: one line that names what came and the way out.

A value of another kind is a TypeError, a value that makes no sense a ValueError.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from locallip.bound.layers import ClampGroupSort, Normalize, ReLU_x


def refuse_model(model: Any) -> None:
    """Refuse what is no network, or one whose weights are not all of one floating-point dtype on one device."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}; make one with ()" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"need the network as an nn.Module, got {what}")
    values = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, value in values.items():
        if is_lazy(value):
            raise ValueError(f"{name} has no shape yet: call the network on an image once")
        if not is_plain(value):
            raise TypeError(f"{name} is a {type(value).__name__}, whose class may say what it does: use plain tensors")
        if value.is_complex():
            raise TypeError(f"{name} is {value.dtype}; weights must be real")
    dtypes = {str(value.dtype): name for name, value in values.items() if value.is_floating_point()}
    if len(dtypes) > 1:
        raise TypeError(f"the weights are of several dtypes, {_listed(dtypes)}: call model.float() or model.double()")
    devices = {str(value.device): name for name, value in values.items()}
    if len(devices) > 1:
        raise ValueError(f"the weights are on several devices, {_listed(devices)}: call model.to(device)")
    if "meta" in devices:
        raise ValueError("the weights are on the device meta, where they have no values: load them first")


def first_weight(model: nn.Module) -> Tensor | None:
    """A weight, or a buffer where there is none, in floating point: dtype and device are those of all."""
    return next((value for value in (*model.parameters(), *model.buffers()) if value.is_floating_point()), None)


def is_plain(tensor: Tensor) -> bool:
    """Whether functions do with a tensor what they do with any; a subclass may say otherwise."""
    function, dispatch = type(tensor).__torch_function__, type(tensor).__torch_dispatch__
    as_any = getattr(function, "__func__", function) is Tensor.__torch_function__.__func__
    return (as_any or function is nn.Parameter.__torch_function__) and dispatch is Tensor.__torch_dispatch__


def _listed(found: dict[str, str]) -> str:
    return " and ".join(f"{what} ({name})" for what, name in sorted(found.items()))


def refuse_images(x: Any, model: Any = None, converted: bool = False) -> None:
    """Refuse what is no dense tensor (N, ...) of floating-point images where the weights of the model are.

    converted: whether images and weights are about to be brought to one dtype, so that theirs may differ.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"need images as a tensor (N, ...), got {type(x).__name__}{_as_tensor('x', x)}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError("need images as a dense tensor (N, ...), got a sparse or nested one: call x.to_dense()")
    if not x.is_floating_point():
        raise TypeError(f"need images in floating point, got {x.dtype}: hand in x.float() in the network's own range")
    if 0 in x.shape[1:]:
        raise ValueError(f"need images with entries, got the shape {tuple(x.shape)}")
    if x.dim() < 2:
        raise ValueError(f"need images (N, ...), got the shape {tuple(x.shape)}: one image is x[None]")
    if x.is_meta:
        raise ValueError("the images are on the device meta, where they have no values: hand in real ones")
    weight = first_weight(model) if isinstance(model, nn.Module) else None
    if weight is None:
        return
    if weight.device != x.device:
        raise ValueError(
            f"the images are on {x.device}, the network on {weight.device}: hand in x.to('{weight.device}')"
        )
    if weight.dtype != x.dtype and not converted:
        raise TypeError(f"the images are {x.dtype}, the weights {weight.dtype}: hand in x.to({weight.dtype})")


def refuse_epsilon(epsilon: Any, x: Tensor) -> None:
    """Refuse what is no finite L2 radius of at least 0, one for all images x (N, ...) or one per image (N,)."""
    if not isinstance(epsilon, Tensor):
        if not 0 <= _number("epsilon", epsilon) < math.inf:
            raise ValueError(f"epsilon must not be negative, NaN or infinite, got {epsilon}")
        return
    if epsilon.layout != torch.strided or epsilon.is_nested or epsilon.is_meta:
        raise TypeError("epsilon must be a number or a dense tensor, got a sparse, nested or meta one")
    if not epsilon.is_floating_point():
        raise TypeError(f"epsilon must be in floating point, got {epsilon.dtype}: hand in epsilon.to(x.dtype)")
    if epsilon.shape not in ((), (len(x),)):
        raise ValueError(f"need one epsilon, or one per image, got {tuple(epsilon.shape)} for {len(x)} images")
    good = (epsilon >= 0) & epsilon.isfinite()
    if not good.all():
        raise ValueError(f"epsilon must not be negative, NaN or infinite, got {epsilon[~good][0].item()}")


def refuse_labels(y: Any, x: Tensor, classes: int) -> None:
    """Refuse labels that are not (N,) int64 where the images x (N, ...) are, or name none of so many classes."""
    refuse_classes(classes)
    if not isinstance(y, Tensor):
        raise TypeError(f"need one label per image, (N,) int64, got {type(y).__name__}{_as_tensor('y', y)}")
    if y.layout != torch.strided or y.is_nested:
        raise TypeError("need one label per image, (N,) int64, as a dense tensor, got a sparse or nested one")
    if y.dtype != torch.int64:
        raise TypeError(f"need one label per image, (N,) int64, got {y.dtype}: hand in y.long() if these are labels")
    if y.shape != (len(x),):
        raise ValueError(f"need one label per image, (N,) int64, got {tuple(y.shape)} for {len(x)} images")
    if y.device != x.device:
        raise ValueError(f"the labels are on {y.device}, the images on {x.device}: hand in y.to(x.device)")
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise ValueError(f"labels must lie between 0 and {classes - 1}, got {outside[0].item()}")


def refuse_classes(classes: int) -> None:
    """Refuse a network with so few logits that no label can be wrong."""
    if classes < 2:
        raise ValueError(f"a label needs two logits or more, got {classes}: make of one logit f the two -f, f")


def refuse_certificate(certificate: Any) -> None:
    """Refuse what is neither the name of a certificate nor an object that answers for norms."""
    if not isinstance(certificate, str):
        if not _answers_for_norms(certificate):
            what = type(certificate).__name__
            raise TypeError(f"the certificate must be 'proven', 'estimate' or an object such as `Norms`, got {what}")
    elif certificate not in ("proven", "estimate"):
        raise ValueError(f"the certificate must be 'proven' or 'estimate', got '{certificate}'")


def refuse_norms(norms: Any) -> None:
    """Refuse what does not answer for norms."""
    if not _answers_for_norms(norms):
        raise TypeError(f"need norms such as PowerIteration(5), got {type(norms).__name__}")


def _answers_for_norms(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("arithmetic", "local_ball", "whole", "masked"))


def refuse_probability(probability: Any) -> None:
    """Refuse what is no failure probability between 0 and 1."""
    if not 0 < _number("the failure probability", probability) < 1:
        raise ValueError(f"the failure probability must lie between 0 and 1, got {probability}")


def refuse_search(tolerance: Any, limit: Any) -> None:
    """Refuse ends of a search for a radius that are not finite and above 0."""
    ends = _number("the tolerance", tolerance), _number("the limit", limit)
    if not all(0 < end < math.inf for end in ends):
        raise ValueError(f"tolerance and limit must be finite and above 0, got {tolerance} and {limit}")
    if not limit / tolerance < math.inf:
        raise ValueError(f"the limit must not be so many times the tolerance, got {limit} and {tolerance}")


def refuse_whole_number(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number, or smaller than the least."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def refuse_clip(clip: Any, x: Tensor) -> None:
    """Refuse what is not the smallest and the largest value of a valid image, or images x (N, ...) outside of it."""
    if not isinstance(clip, tuple | list) or len(clip) != 2:
        raise TypeError(f"clip must be the smallest and the largest value of a valid image, such as (0, 1), got {clip}")
    low, high = (_number("an end of clip", end) for end in clip)
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"clip must be the smallest and the largest value of a valid image, got {clip}")
    if ((x < low) | (x > high)).any():
        raise ValueError(f"an image has values outside of {clip}")


def refuse_mask(mask: Any, x: Tensor, whose: str) -> None:
    """Refuse what is no bool tensor with an entry for each of x: other numbers would pick rows, not switch them off."""
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == x.shape:
        return
    got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
    raise TypeError(f"{whose} must tell what can vary by a bool tensor {tuple(x.shape)}, got {got}")


def refuse_width(layer: nn.Module, position: int | str, shape: torch.Size) -> None:
    """Refuse activations of another width than a layer takes, with a ValueError that names both.

    shape: of one image's activations before the layer.
    """
    expected = _expected(layer, shape)
    if expected is None or _fits(expected, shape):
        return
    one_image = isinstance(layer, nn.modules.conv._ConvNd) and len(shape) == len(expected) - 1
    hint = "; one image is x[None]" if one_image else ""
    name = f"{type(layer).__name__} at position {position}"
    raise ValueError(f"{name} takes (N, {_sizes(expected)}), but gets (N, {_sizes(shape)}){hint}")


def refuse_no_outputs(layer: nn.Module, position: int | str, shape: torch.Size, behind: torch.Size) -> None:
    """Refuse activations that are so small that nothing of them is left behind a layer, with a ValueError."""
    if any(size < 1 for size in behind):
        raise ValueError(f"{type(layer).__name__} at position {position} leaves nothing of (N, {_sizes(shape)})")


# Axes of the images of a convolution, of 1, 2 and 3 dimensions.
_AXES = {1: ("L",), 2: ("H", "W"), 3: ("D", "H", "W")}


def _expected(layer: nn.Module, shape: torch.Size) -> tuple[int | str, ...] | None:
    """Sizes that a layer takes, a letter for any; None: whatever comes, or nobody knows."""
    if isinstance(layer, nn.Linear):
        # What else it needs says its rule.
        return (layer.in_features,) if len(shape) == 1 else None
    if isinstance(layer, nn.modules.conv._ConvNd):
        return layer.in_channels, *_AXES[len(layer.kernel_size)]
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return layer.num_features, *_AXES.get(len(shape) - 1, ())
    if isinstance(layer, Normalize):
        channels = max(len(layer.mean), len(layer.std))
        return "C" if channels == 1 else channels, "H", "W"
    if isinstance(layer, ReLU_x):
        sizes = tuple(map(_or_any, layer.threshold.shape[1:]))
        return (*"*" * (len(shape) - len(sizes)), *sizes)  # fewer axes broadcast along the last ones
    if isinstance(layer, ClampGroupSort):
        pairs, *rest = map(_or_any, layer.min.shape[1:])
        return pairs if isinstance(pairs, str) else 2 * pairs, *rest
    return None


def _or_any(size: int) -> int | str:
    """Along an axis with one threshold all entries share it."""
    return "*" if size == 1 else size


def _fits(expected: tuple[int | str, ...], shape: torch.Size) -> bool:
    same_axes = len(expected) == len(shape)
    return same_axes and all(isinstance(want, str) or want == size for want, size in zip(expected, shape))


def _sizes(shape: Iterable[int | str]) -> str:
    return ", ".join(map(str, shape))


# Integers beyond it are no finite floating-point numbers.
_LARGEST = int(sys.float_info.max)


def _number(name: str, value: Any) -> Any:
    is_number = isinstance(value, int | float) or (isinstance(value, Real) and hasattr(value, "dtype"))
    if isinstance(value, bool) or not is_number:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{_as_tensor(name, value)}")
    return math.inf if isinstance(value, int) and abs(value) > _LARGEST else value


def _as_tensor(name: str, value: Any) -> str:
    """The way out for what could be a tensor."""
    convertible = isinstance(value, list | tuple) or type(value).__module__.partition(".")[0] == "numpy"
    if not convertible or " " in name:
        return ""
    dtype = ", dtype=x.dtype" if name == "epsilon" else ""
    name = "labels" if name == "y" else name
    return f": hand in torch.tensor({name}{dtype})"

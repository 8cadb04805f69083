"""Augmentation of training images, on the device and with one resampling."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config.sections import AugmentConfig
from harness.machine import device

_TRIES = 10


def augment(
    pixels: Tensor | list[Tensor], config: AugmentConfig, generator: torch.Generator
) -> Tensor | list[Tensor]:
    """Crop, shift, rotate, mirror and brighten uint8 (B, H, W, 3) -> uint8 of the same shape.

    Whole images are a list of (H, W, 3), each of which keeps its shape.

    LAVIS crops the original image and enlarges it with a bicubic filter. This function crops the squashed
    image with a bilinear filter, since NPUs before Atlas A2 have no other (CANN's aclnnGridSampler2D).
    `generator` is on the CPU, so every device draws the same numbers.
    """
    moved = config.random_crop < 1 or config.shift or config.rotate or config.horizontal_flip
    if not moved and not config.brightness:
        return pixels
    if isinstance(pixels, list):
        return [augment(image[None], config, generator)[0] for image in pixels]
    images = pixels.permute(0, 3, 1, 2).float()
    if moved:
        grid = F.affine_grid(
            device.moved(_transforms(len(images), images.shape[2:], config, generator), images.device),
            images.shape,
            align_corners=False,
        )
        images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    if config.brightness:
        factors = 1 + config.brightness * (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 1)
        gain, contrast = device.moved(factors, images.device)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = ((images - mean) * contrast + mean) * gain
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _transforms(
    count: int, shape: Sequence[int], config: AugmentConfig, generator: torch.Generator
) -> Tensor:
    """One output-to-input affine matrix per image, (B, 2, 3), in units of half the image's sides."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    tall, wide = shape
    sides = torch.tensor([wide, tall, wide, tall])[:, None]
    left, top, width, height = crops(count, shape, config.random_crop, generator) / sides
    x = 2 * left + width - 1 + draw(-2, 2) * config.shift
    y = 2 * top + height - 1 + draw(-2, 2) * config.shift
    angle = draw(-1, 1) * math.radians(config.rotate)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0) if config.horizontal_flip else torch.ones(count)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [
            torch.stack([width * cos * mirror, -height * sin * (tall / wide), x], dim=1),
            torch.stack([width * sin * mirror * (wide / tall), height * cos, y], dim=1),
        ],
        dim=1,
    )


def crops(count: int, size: int | Sequence[int], smallest: float, generator: torch.Generator) -> Tensor:
    """Left, top, width and height in whole pixels, (4, count), of random crops of images.

    `size` is the side of squares, or the images' height and width in pixels.
    They are drawn as in LAVIS, which uses torchvision's RandomResizedCrop. The area is uniform between
    `smallest` and the whole. The log of width / height is uniform between log 3/4 and log 4/3. The first of
    ten tries that fits is used; if none fits, there is no crop.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if smallest == 1:
        return torch.tensor([0.0, 0.0, width, height])[:, None].expand(4, count)
    draws = torch.rand(2, _TRIES, count, generator=generator)
    area = (smallest + (1 - smallest) * draws[0]) * (width * height)
    ratio = torch.exp(math.log(4 / 3) * (2 * draws[1] - 1))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).round()
    most = torch.tensor([width, height])[:, None]
    fits = ((sides > 0) & (sides <= most[:, None])).all(0)
    first = sides[:, fits.int().argmax(0), torch.arange(count)]
    side = torch.where(fits.any(0), first, most)
    place = torch.rand(2, count, generator=generator) * (most - side + 1)
    return torch.cat([place.floor(), side])

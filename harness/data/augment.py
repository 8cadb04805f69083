"""Augmentation of training images, on the device and with one resampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config.sections import AugmentConfig
from harness.machine import device

_TRIES = 10


def augment(pixels: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Crop, shift, rotate, mirror and brighten uint8 (B, S, S, 3) -> uint8 of the same shape.

    LAVIS crops the original image and enlarges it with a bicubic filter. This function crops the squashed
    image with a bilinear filter, since NPUs before Atlas A2 have no other (CANN's aclnnGridSampler2D).
    `generator` is on the CPU, so every device draws the same numbers.
    """
    moved = config.random_crop < 1 or config.shift or config.rotate or config.horizontal_flip
    if not moved and not config.brightness:
        return pixels
    images = pixels.permute(0, 3, 1, 2).float()
    if moved:
        grid = F.affine_grid(
            device.moved(_transforms(len(images), images.shape[2], config, generator), images.device),
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


def _transforms(count: int, size: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """One output-to-input affine matrix per image, (B, 2, 3), in units of half the image's side."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    left, top, width, height = crops(count, size, config.random_crop, generator) / size
    x = 2 * left + width - 1 + draw(-2, 2) * config.shift
    y = 2 * top + height - 1 + draw(-2, 2) * config.shift
    angle = draw(-1, 1) * math.radians(config.rotate)
    mirror = torch.where(draw(0, 1) < 0.5, -1.0, 1.0) if config.horizontal_flip else torch.ones(count)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack(
        [
            torch.stack([width * cos * mirror, -height * sin, x], dim=1),
            torch.stack([width * sin * mirror, height * cos, y], dim=1),
        ],
        dim=1,
    )


def crops(count: int, size: int, smallest: float, generator: torch.Generator) -> Tensor:
    """Left, top, width and height in whole pixels, (4, count), of random crops of squares of `size` pixels.

    They are drawn as in LAVIS, which uses torchvision's RandomResizedCrop. The area is uniform between
    `smallest` and the whole. The log of width / height is uniform between log 3/4 and log 4/3. The first of
    ten tries that fits is used; if none fits, there is no crop.
    """
    if smallest == 1:
        return torch.tensor([0.0, 0.0, size, size])[:, None].expand(4, count)
    draws = torch.rand(2, _TRIES, count, generator=generator)
    area = (smallest + (1 - smallest) * draws[0]) * size**2
    ratio = torch.exp(math.log(4 / 3) * (2 * draws[1] - 1))
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()]).round()
    fits = ((sides > 0) & (sides <= size)).all(0)
    first = sides[:, fits.int().argmax(0), torch.arange(count)]
    side = torch.where(fits.any(0), first, size)
    place = torch.rand(2, count, generator=generator) * (size - side + 1)
    return torch.cat([place.floor(), side])

"""What is done to training images, on the device and in one resampling."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.config import AugmentConfig


def augment(pixels: Tensor, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """Crop, shift, rotate, mirror and brighten uint8 (B, S, S, 3) -> uint8 of the same shape.

    `generator` lives on the CPU, so that every device draws the same numbers.
    """
    moved = config.random_crop < 1 or config.shift or config.rotate or config.horizontal_flip
    if not moved and not config.brightness:
        return pixels
    images = pixels.permute(0, 3, 1, 2).float()
    if moved:
        grid = F.affine_grid(
            _transforms(len(images), config, generator).to(images.device), images.shape, False
        )
        images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    if config.brightness:
        factors = 1 + config.brightness * (2 * torch.rand(2, len(images), 1, 1, 1, generator=generator) - 1)
        gain, contrast = factors.to(images.device)
        mean = images.mean((1, 2, 3), keepdim=True)
        images = ((images - mean) * contrast + mean) * gain
    return images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _transforms(count: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """One output-to-input affine matrix per image, (B, 2, 3), in units of half the image's side."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    area = draw(config.random_crop, 1)
    ratio = torch.exp(draw(math.log(3 / 4), math.log(4 / 3))) if config.random_crop < 1 else torch.ones(count)
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    x = draw(-1, 1) * (1 - width) + draw(-2, 2) * config.shift
    y = draw(-1, 1) * (1 - height) + draw(-2, 2) * config.shift
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

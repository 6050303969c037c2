"""Judges images on the CPU, without JAX, so that other processes can do it in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.checker import check
from benchmarks.quality.prompts import CATEGORIES, Prompt


def judge_image(image: np.ndarray, prompt: Prompt) -> dict[str, bool]:
    """Check an image for the attributes that the prompt's category asks for.

    Returns:
        The result of `benchmarks.checker.check`.
    """
    result = check(image, prompt.scene, mentioned=CATEGORIES[prompt.category])
    return {name: bool(value) for name, value in result.items()}


def similarity(image: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Compute "psnr" (dB) and "ssim" of two RGB images [height, width, 3] in [0, 1]."""
    options: dict[str, Any] = {"channel_axis": 2, "data_range": 1}
    with np.errstate(divide="ignore"):
        psnr = float(peak_signal_noise_ratio(reference, image, data_range=1))
    return {
        "psnr": psnr,
        "ssim": float(np.asarray(structural_similarity(image, reference, **options))),
    }


def judge_images(
    prompt: Prompt, reference: np.ndarray, images: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Judge the images that several methods made for one prompt.

    Args:
        prompt: the prompt.
        reference: the image of the reference method, [height, width, 3] in [0, 1].
        images: images by name of the method.

    Returns:
        By name of the method, "verdict" from `judge_image`, and "psnr" and "ssim" against the
        reference.
    """
    return {
        name: {"verdict": judge_image(image, prompt), **similarity(image, reference)}
        for name, image in images.items()
    }

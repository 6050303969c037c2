"""What is measured of a picture without a device, so that other processes can do it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.checker import check
from benchmarks.quality.prompts import CATEGORIES, Prompt


def judge(image: np.ndarray, prompt: Prompt) -> dict[str, bool]:
    """The checker's verdict on what the prompt's category asks for."""
    result = check(image, prompt.scene, mentioned=CATEGORIES[prompt.category])
    return {name: bool(value) for name, value in result.items()}


def similarity(image: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """PSNR (dB) and SSIM of two RGB pictures [h, w, 3] in [0, 1]."""
    how: dict[str, Any] = {"channel_axis": 2, "data_range": 1}
    with np.errstate(divide="ignore"):
        psnr = float(peak_signal_noise_ratio(reference, image, data_range=1))
    return {"psnr": psnr, "ssim": float(np.asarray(structural_similarity(image, reference, **how)))}


def mark(
    prompt: Prompt, reference: np.ndarray, images: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """By method: the verdict on its picture, and its similarity to the picture `reference`."""
    return {
        name: {"verdict": judge(image, prompt), **similarity(image, reference)}
        for name, image in images.items()
    }

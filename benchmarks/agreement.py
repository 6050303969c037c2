"""Measures how often the image checker agrees with rendered scenes, clean and degraded.

    python -m benchmarks.agreement                 1 to 4 things, 256 and 512 px, all degradations
    python -m benchmarks.agreement --count 50      fewer scenes

Each row of the table is one kind of scene with one degradation. "right" means that count, colour,
shape, size and relation are correct; "texture" that the texture of every thing is.
"""

from __future__ import annotations

import argparse
import io

import numpy as np
from PIL import Image
from scipy import ndimage
from tqdm import tqdm

from benchmarks.checker import check
from training.scenes import Scene, random_scene, render

DEGRADATIONS = ("clean", "noise", "blur", "jpeg")


def degrade(image: np.ndarray, degradation: str, rng: np.random.Generator) -> np.ndarray:
    """Degrade an image as a camera or a codec might.

    Args:
        image: [height, width, 3] in [0, 1].
        degradation: one of `DEGRADATIONS`; "clean" changes nothing.
        rng: source of the noise.

    Returns:
        float32 [height, width, 3] in [0, 1].
    """
    if degradation == "noise":
        image = image + rng.normal(0, 0.04, image.shape)
    elif degradation == "blur":
        image = ndimage.gaussian_filter(image, (len(image) / 256, len(image) / 256, 0))
    elif degradation == "jpeg":
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=60)
        image = np.asarray(Image.open(buffer)) / 255
    return np.clip(image, 0, 1).astype(np.float32)


def run_checks(
    things: int, same: bool, side: int, degradation: str, count: int, seed: int = 7
) -> list[tuple[Scene, dict[str, bool]]]:
    """Check the degraded images of random scenes, half of them held out from training.

    Args:
        things: number of things in each scene, 1 to 4.
        same: whether the things of a scene share all attributes.
        side: side of the images in pixels.
        degradation: one of `DEGRADATIONS`.
        count: number of scenes.
        seed: seed of the scenes and the noise.

    Returns:
        One (scene, result of `check`) pair per scene.
    """
    pairs = []
    for i in range(count):
        rng = np.random.default_rng((seed, side, i))
        scene = random_scene(rng, things=things, same=same, unseen=i % 2 == 0)
        pairs.append((scene, check(degrade(render(scene, side, side), degradation, rng), scene)))
    return pairs


def main() -> None:
    """Print the table, then the shares over all images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="scenes per row (default: 200)")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    scene_kinds = [(1, False), (2, False), (2, True), (3, True), (4, True)]
    print("| things | side | degradation | right | texture |\n|---|---|---|---|---|")
    all_results = []
    with tqdm(
        total=len(scene_kinds) * len(args.sides) * len(DEGRADATIONS) * args.count
    ) as progress:
        for things, same in scene_kinds:
            for side in args.sides:
                for degradation in DEGRADATIONS:
                    pairs = run_checks(things, same, side, degradation, args.count, args.seed)
                    results = [result for _, result in pairs]
                    all_results += results
                    progress.update(len(pairs))
                    right, texture = (
                        np.mean([r[part] for r in results]) for part in ("right", "texture")
                    )
                    alike = " alike" if same else ""
                    print(
                        f"| {things}{alike} | {side} | {degradation} | {right:.1%} "
                        f"| {texture:.1%} |"
                    )
    right, texture = (np.mean([r[part] for r in all_results]) for part in ("right", "texture"))
    print(f"\n{len(all_results)} images: right {right:.2%}, texture {texture:.2%}")


if __name__ == "__main__":
    main()

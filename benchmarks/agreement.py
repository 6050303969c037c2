"""How often the checker agrees with drawn scenes, clean and spoilt: it must, before it may judge.

    python -m benchmarks.agreement                 1 to 4 things, 256 and 512 px, all ways to spoil
    python -m benchmarks.agreement --count 50      fewer scenes

Each row is one kind of scene and of spoiling; "right" is count, colour, shape, size and relation,
"texture" the texture of every thing.
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

WAYS = ("clean", "noise", "blur", "jpeg")


def spoil(image: np.ndarray, how: str, rng: np.random.Generator) -> np.ndarray:
    """The picture [h, w, 3] as a camera or a codec might leave it; float32 in [0, 1]."""
    if how == "noise":
        image = image + rng.normal(0, 0.04, image.shape)
    elif how == "blur":
        image = ndimage.gaussian_filter(image, (len(image) / 256, len(image) / 256, 0))
    elif how == "jpeg":
        file = io.BytesIO()
        Image.fromarray((image * 255).round().astype(np.uint8)).save(file, "JPEG", quality=60)
        image = np.asarray(Image.open(file)) / 255
    return np.clip(image, 0, 1).astype(np.float32)


def agreement(
    things: int, same: bool, side: int, how: str, count: int, seed: int = 7
) -> list[tuple[Scene, dict[str, bool]]]:
    """`count` scenes and what the checker makes of their spoilt pictures."""
    found = []
    for i in range(count):
        rng = np.random.default_rng((seed, side, i))
        scene = random_scene(rng, things=things, same=same, unseen=i % 2 == 0)
        found.append((scene, check(spoil(render(scene, side, side), how, rng), scene)))
    return found


def main() -> None:
    """Print the table and the least share of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200, help="scenes per row (default: 200)")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    kinds = [(1, False), (2, False), (2, True), (3, True), (4, True)]
    print("| things | side | spoilt by | right | texture |\n|---|---|---|---|---|")
    everything = []
    with tqdm(total=len(kinds) * len(args.sides) * len(WAYS) * args.count) as bar:
        for things, same in kinds:
            for side in args.sides:
                for how in WAYS:
                    found = agreement(things, same, side, how, args.count, args.seed)
                    results = [result for _, result in found]
                    everything += results
                    bar.update(len(found))
                    right, texture = (
                        np.mean([r[part] for r in results]) for part in ("right", "texture")
                    )
                    alike = " alike" if same else ""
                    print(f"| {things}{alike} | {side} | {how} | {right:.1%} | {texture:.1%} |")
    right, texture = (np.mean([r[part] for r in everything]) for part in ("right", "texture"))
    print(f"\n{len(everything)} pictures: right {right:.2%}, texture {texture:.2%}")


if __name__ == "__main__":
    main()

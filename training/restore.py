"""Makes training checkpoints from an exported folder, to continue where the run was not kept.

    python -m training.restore --folder jitjax/checkpoints/tiny

The checkpoints have the folder's weights, averaged and rounded to float16, and no optimizer states.
The step starts at 1000, after the warm-up and with other data than a new run.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from diffusers import AutoencoderKL, FluxTransformer2DModel
from transformers import CLIPTextModel, T5EncoderModel

from training.common import RUNS, save_atomically
from training.model import TinyFlux


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("jitjax/checkpoints/tiny"))
    parser.add_argument("--out", type=Path, default=RUNS)
    parser.add_argument("--step", type=int, default=1000)
    args = parser.parse_args()
    if (args.out / "flow.pt").exists():
        raise FileExistsError(
            f"{args.out / 'flow.pt'} exists; continue from it with training.flow, or move it away"
        )

    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(args.folder / name, args.out / "tokenizers" / name, dirs_exist_ok=True)
    vae = AutoencoderKL.from_pretrained(args.folder / "vae").float()
    autoencoder_state = {
        "average": vae.state_dict(),
        "shift": vae.config.shift_factor,
        "scale": vae.config.scaling_factor,
    }
    save_atomically(autoencoder_state, args.out / "autoencoder.pt")

    model = TinyFlux(args.out / "tokenizers")
    for module, cls, name in (
        (model.transformer, FluxTransformer2DModel, "transformer"),
        (model.clip, CLIPTextModel, "text_encoder"),
        (model.t5, T5EncoderModel, "text_encoder_2"),
    ):
        module.load_state_dict(cls.from_pretrained(args.folder / name).float().state_dict())
    average = {name: p.detach() for name, p in model.named_parameters()}
    flow_state = {
        "weights": model.state_dict(),
        "average": average,
        "step": args.step,
        "positions": {},
    }
    save_atomically(flow_state, args.out / "flow.pt")
    print(f"wrote {args.out / 'autoencoder.pt'}, {args.out / 'flow.pt'} and the tokenizers")


if __name__ == "__main__":
    main()

"""Measures diffusers' FLUX transformer in PyTorch at the shapes of `benchmarks.speed`.

    python -m benchmarks.torch_speed --out torch.jsonl     needs torch, diffusers and a GPU
    python -m benchmarks.torch_speed --device cpu --dtype float32 --tiny --tokens 64 --no-compile

Weights are random. The blocks are compiled by diffusers' `compile_repeated_blocks`. Attention is
PyTorch's `scaled_dot_product_attention`, once with its default choice of kernel, once with cuDNN's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

TINY = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 24,
        "axes_dims_rope": (4, 6, 6)}  # fmt: skip


def main() -> None:
    """Print a JSON row per attention backend and number of image tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 2539, 1433])
    parser.add_argument("--backends", nargs="+", default=["native", "_native_cudnn"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to test this program")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--matmul", type=int, default=8192)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    run_info = {"device": device_name, "torch": torch.__version__, "dtype": args.dtype}

    def synchronise() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    def measure(call) -> dict[str, float]:
        for _ in range(2):
            call()
        synchronise()
        seconds = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            call()
            synchronise()
            seconds.append(time.perf_counter() - start)
        return {"seconds": statistics.median(seconds), "lowest": min(seconds),
                "highest": max(seconds)}  # fmt: skip

    def record_row(row: dict) -> None:
        line = json.dumps(row | run_info)
        print(line, flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(line + "\n")

    with torch.inference_mode():
        size = (args.matmul, args.matmul)
        a, b = (torch.randn(*size, device=args.device, dtype=dtype) for _ in range(2))
        timing = measure(lambda: torch.matmul(a, b))
        tflops = 2 * args.matmul**3 / timing["seconds"] / 1e12
        record_row({"row": "matmul", "tflops_per_second": tflops, **timing})
    torch.set_default_dtype(dtype)
    with torch.device(args.device):
        model = FluxTransformer2DModel(guidance_embeds=True, **(TINY if args.tiny else {})).eval()
    torch.set_default_dtype(torch.float32)
    config: Any = model.config

    def random_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=args.device, dtype=dtype)

    for backend in args.backends:
        model.set_attention_backend(backend)
        if not args.no_compile:
            torch._dynamo.reset()
            model.compile_repeated_blocks(fullgraph=True)
        for tokens in args.tokens:
            ids = torch.zeros(tokens, 3, device=args.device)
            ids[:, 1] = torch.arange(tokens, device=args.device) // 64
            ids[:, 2] = torch.arange(tokens, device=args.device) % 64
            inputs = {
                "hidden_states": random_tensor(1, tokens, config.in_channels),
                "encoder_hidden_states": random_tensor(1, 512, config.joint_attention_dim),
                "pooled_projections": random_tensor(1, config.pooled_projection_dim),
                "timestep": torch.full((1,), 0.9, device=args.device, dtype=dtype),
                "guidance": torch.full((1,), 3.5, device=args.device),
                "img_ids": ids,
                "txt_ids": torch.zeros(512, 3, device=args.device),
            }
            try:
                with torch.inference_mode():
                    start = time.perf_counter()
                    model(**inputs)
                    synchronise()
                    first = time.perf_counter() - start
                    timing = measure(lambda inputs=inputs: model(**inputs))
            except Exception as error:
                record_row({"row": "forward", "backend": backend, "tokens": tokens,
                        "error": str(error)[:300]})  # fmt: skip
                continue
            record_row({"row": "forward", "backend": backend, "tokens": tokens,
                    "compiled": not args.no_compile, "first": first, **timing})  # fmt: skip


if __name__ == "__main__":
    main()

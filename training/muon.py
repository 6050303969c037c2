"""The Muon optimizer, for matrices and convolution filters.

torch.optim.Muon accepts matrices only, and processes them one at a time in bfloat16, which is slow
on processors without instructions for it.
"""

from __future__ import annotations

import torch

from training.common import FAST_BFLOAT16


def orthogonalise(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Approximate U V^T of each matrix's singular value decomposition by Newton-Schulz iteration.

    Args:
        stack: matrices [n, rows, columns].
        steps: number of iterations.

    Returns:
        Matrices of the same shape and dtype with singular values near 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # coefficients of Muon's authors
    x = stack / (stack.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    x = x.bfloat16() if FAST_BFLOAT16 else x  # twice as fast, and precise enough
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    for _ in range(steps):
        g = x @ x.mT
        x = a * x + (b * g + c * g @ g) @ x
    return (x if wide else x.mT).to(stack.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions; the trailing ones are flattened into columns.

    Matrices of equal shape are orthogonalised in one batch.

    Args:
        params: the parameters.
        lr: learning rate.
        momentum: decay of the momentum.
        weight_decay: decoupled weight decay, relative to the learning rate.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list] = {}
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"]).reshape(len(p), -1)
                by_shape.setdefault(tuple(update.shape), []).append((p, update))
            for (rows, columns), pairs in by_shape.items():
                updates = orthogonalise(torch.stack([update for _, update in pairs]))
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.reshape(p.shape), alpha=scale)

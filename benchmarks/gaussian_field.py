"""A Gaussian field whose flow is known exactly, and the distance of a linear map's pictures to it.

The field is a window of n x n tokens, cut from a periodic field of `period` x `period` tokens with
the spectrum (k^2 + 1)^(-a / 2), k in whole waves per period. With x = (1 - s) x0 + s eps, and C the
covariance of x0 on any set of tokens, the ideal velocity given x on these tokens alone is

    E[eps - x0 | x] = (s I - (1 - s) C) ((1 - s)^2 C + s^2 I)^-1 x

On all tokens its flow takes noise eps to C^(1/2) eps: the converged picture of that noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jaxtyping import Array, Bool, Float, Int
from scipy.fft import dctn
from scipy.special import stdtrit


@dataclass(frozen=True)
class Field:
    """A stationary Gaussian field of variance 1 on a square grid, one number per token.

    Attributes:
        side: rows, and columns, of tokens.
        exponent: a of the spectrum (k^2 + 1)^(-a / 2); natural pictures have about 2 to 3.
        period: rows, and columns, after which the field repeats, at least `side`. None for
            3 * `side`, where the edges of the window are all but independent of each other;
            with `side` the window itself is periodic.

    Raises:
        ValueError: a field has an invalid value.
    """

    side: int = 24
    exponent: float = 3.0
    period: int | None = None

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"Field.side is {self.side}; expected a positive integer")
        if self.period is not None and self.period < self.side:
            raise ValueError(f"Field.period is {self.period}; expected at least {self.side}")
        if not 0 <= self.exponent <= 8:  # above, the covariance is singular to rounding
            raise ValueError(f"Field.exponent is {self.exponent}; expected 0 to 8")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.side, self.side

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.side**2

    @cached_property
    def offsets(self) -> Float[np.ndarray, "rows columns"]:
        """Covariance of two tokens that are so many rows and columns apart, [side, side]."""
        period = self.period or 3 * self.side
        waves = np.fft.fftfreq(period, 1 / period)
        spectrum = (waves[:, None] ** 2 + waves[None] ** 2 + 1) ** (-self.exponent / 2)
        covariance = np.fft.ifft2(spectrum).real
        return (covariance / covariance[0, 0])[: self.side, : self.side]

    @cached_property
    def covariance(self) -> Float[np.ndarray, "n n"]:
        """Covariance of all tokens, in row-major order."""
        row, column = np.indices(self.grid).reshape(2, -1)
        apart = [np.abs(p[:, None] - p[None]) for p in (row, column)]
        return self.offsets[apart[0], apart[1]]

    @cached_property
    def root(self) -> Float[np.ndarray, "n n"]:
        """The exact flow from noise to pictures: the symmetric root of the covariance."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.sqrt(values)) @ vectors.T

    @cached_property
    def frequency(self) -> Int[np.ndarray, " n"]:
        """Radial frequency of each mode of the cosine transform, in whole waves per window."""
        row, column = np.indices(self.grid).reshape(2, -1)
        return np.rint(np.hypot(row, column) / 2).astype(int)

    def spectrum(self, power: Float[np.ndarray, " n"]) -> Float[np.ndarray, " frequencies"]:
        """Add the powers of the modes of each radial frequency."""
        return np.bincount(self.frequency, power)

    @cached_property
    def true_spectrum(self) -> Float[np.ndarray, " frequencies"]:
        """Power of the field at each radial frequency."""
        return self.spectrum((cosine_modes(self, self.root) ** 2).sum(1))


def cosine_modes(field: Field, values: Float[np.ndarray, "*p n d"]) -> Float[np.ndarray, "*p n d"]:
    """Transform fields, one per column, to the orthonormal cosine basis (no jump at the edges)."""
    columns = values.shape[-1]
    rows_and_columns = values.reshape(*values.shape[:-2], *field.grid, columns)
    return np.asarray(dctn(rows_and_columns, axes=(-3, -2), norm="ortho")).reshape(values.shape)


def ideal_velocity(
    tokens: Float[Array, "b m d"],
    positions: Int[Array, "b m 3"],
    sigma: Any,
    valid: Bool[Array, "b m"] | None,
    offsets: Float[Array, "side side"],
) -> Float[Array, "b m d"]:
    """Compute the expected velocity of a Gaussian field, given some of its tokens only.

    It is a `jitjax.sampler.Velocity`.

    Args:
        tokens: the states of the given tokens; the channels are independent fields.
        positions: (0, row, column) of each token.
        sigma: noise level, in [0, 1].
        valid: False in padded slots, which are independent of the others; None if there are none.
        offsets: `Field.offsets`.
    """
    if tokens.shape[1] == offsets.size:  # all tokens, hence the same for all samples
        positions = positions[:1]
    row, column = positions[:, :, 1], positions[:, :, 2]
    apart = [jnp.abs(p[:, :, None] - p[:, None, :]) for p in (row, column)]
    covariance = offsets[apart[0], apart[1]].astype(tokens.dtype)
    if valid is not None:
        both = valid[:, :, None] & valid[:, None, :]
        covariance = jnp.where(both, covariance, 0)
    identity = jnp.eye(tokens.shape[1], dtype=tokens.dtype)[None]
    total = (1 - sigma) ** 2 * covariance + sigma**2 * identity
    lower = jnp.linalg.cholesky(total)
    # The two factors commute, so their order is free.
    mean = jax.vmap(lambda a, b: cho_solve((a, True), b))(
        lower, sigma * identity - (1 - sigma) * covariance
    )
    mean = jnp.broadcast_to(mean, (tokens.shape[0], *mean.shape[1:]))
    return jnp.einsum("bij,bjd->bid", mean, tokens, precision="highest")


@dataclass(frozen=True)
class Scores:
    """How near pictures are to the field; all but `spectrum` relative to the field's variance.

    Attributes:
        wasserstein: squared Wasserstein distance of the pictures' distribution to the field's.
        spectral: the part of it that the powers at each radial frequency show: a lower bound.
        variance: variance of the pictures.
        distance: root mean square distance to the converged picture of the same noise; its square
            is an upper bound of `wasserstein`.
        spectrum: power of the pictures over the field's, at 0, 1, 2, ... waves per window.
    """

    wasserstein: float
    spectral: float
    variance: float
    distance: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class LinearMap:
    """The pictures `initial @ eps + fresh @ z` of two independent standard normal noises.

    Attributes:
        field: the field that the pictures are compared with.
        initial: map of the initial noise.
        fresh: map of the micro-flow's noise; None if it has none.
    """

    field: Field
    initial: Float[np.ndarray, "n n"]
    fresh: Float[np.ndarray, "n n"] | None = None

    def __call__(
        self, noise: Float[np.ndarray, "*p n d"], fresh: Float[np.ndarray, "*p n d"] | None = None
    ) -> Float[np.ndarray, "*p n d"]:
        """Return the pictures of the given noises; `fresh` is needed if there is a map of it."""
        pictures = self.initial @ noise
        return pictures if self.fresh is None else pictures + self.fresh @ fresh

    @cached_property
    def both(self) -> Float[np.ndarray, "n m"]:
        """The maps of both noises side by side."""
        maps = [self.initial] if self.fresh is None else [self.initial, self.fresh]
        return np.concatenate(maps, axis=1)

    @cached_property
    def power(self) -> Float[np.ndarray, " n"]:
        """Variance of each mode of the cosine transform."""
        return (cosine_modes(self.field, self.both) ** 2).sum(1)

    @cached_property
    def _overlap(self) -> tuple[np.ndarray, np.ndarray]:
        # Eigenvalues and eigenvectors of (C^(1/2) S C^(1/2))^(1/2).
        product = self.field.root @ self.both
        values, vectors = np.linalg.eigh(product @ product.T)
        return np.sqrt(values.clip(0)), vectors

    @cached_property
    def transport(self) -> Float[np.ndarray, "n n"]:
        """The optimal map from the pictures to the field."""
        values, vectors = self._overlap
        half = self.field.root @ vectors
        return (half / values) @ half.T

    def scores(self) -> Scores:
        """Compute the exact scores (Wasserstein distance of centred Gaussians: Bures)."""
        total = self.field.covariance.trace()
        squared = (self.both**2).sum()
        apart = ((self.initial - self.field.root) ** 2).sum()
        if self.fresh is not None:
            apart += (self.fresh**2).sum()
        return Scores(
            wasserstein=float((total + squared - 2 * self._overlap[0].sum()) / total),
            distance=float(np.sqrt(apart / total)),
            **_spectral(self.field, self.power),
        )


def score_pictures(
    reference: LinearMap,
    pictures: Float[np.ndarray, "p n d"],
    noise: Float[np.ndarray, "p n d"],
    fresh: Float[np.ndarray, "p n d"] | None = None,
) -> tuple[Scores, dict[str, float]]:
    """Estimate the scores of a sampler that is no linear map, but similar to one.

    The difference to the linear map's pictures of the same noises is estimated, and added to its
    exact scores. `wasserstein` is then a lower bound, which differs from the distance in second
    order: the optimal transport of the linear map has a dual solution, by which every other
    distribution has a bound too (Kantorovich).

    Args:
        reference: the linear map.
        pictures: the sampler's results; the channels of a picture may depend on each other.
        noise: their initial noises.
        fresh: the noises of their micro-flow, if the reference has a map of it.

    Returns:
        The scores, and half the width of the 95 % interval of `wasserstein`, `variance` and
        `distance` (Student's t over pictures).
    """
    field, count = reference.field, pictures.shape[0]
    converged = field.root @ noise
    dual = np.eye(field.tokens) - reference.transport

    def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        power = (cosine_modes(field, x) ** 2).mean(-1)
        return power, ((x - converged) ** 2).sum(1).mean(-1), (x * (dual @ x)).sum(1).mean(-1)

    here, there = moments(pictures), moments(reference(noise, fresh))
    power, apart, cost = (a - b for a, b in zip(here, there, strict=True))
    total, exact = field.covariance.trace(), reference.scores()
    distance = math.sqrt(exact.distance**2 + apart.mean() / total)
    half_widths = {
        name: float(stdtrit(count - 1, 0.975) * per_picture.std(ddof=1) / math.sqrt(count) / total)
        for name, per_picture in (
            ("wasserstein", cost),
            ("variance", power.sum(1)),
            ("distance", apart / (2 * distance)),
        )
    }
    scores = Scores(
        wasserstein=float(exact.wasserstein + cost.mean() / total),
        distance=distance,
        **_spectral(field, reference.power + power.mean(0)),
    )
    return scores, half_widths


def _spectral(field: Field, power: Float[np.ndarray, " n"]) -> dict[str, Any]:
    spectrum, truth = field.spectrum(power), field.true_spectrum
    return {
        "spectral": float(((np.sqrt(spectrum) - np.sqrt(truth)) ** 2).sum() / truth.sum()),
        "variance": float(spectrum.sum() / truth.sum()),
        "spectrum": tuple((spectrum / truth).tolist()),
    }

"""Bytes that the compiled programs of a picture take: text and picture encoder, stages, decoder.

The account names the arrays that are alive when a program needs most. For "cpu" they are those that
XLA's own account shows (`memory_analysis` of the full-size programs in float32, jax 0.10 to 0.12):
XLA copies the kernels of a block out of their stack, and attention takes one head at a time. For
"gpu" they are derived in the same way, and not measured: kernels are read in place, attention is
cuDNN's and holds no logits. `docs/scaling.md` has the differences to what was measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp

from jitjax.config import AutoencoderConfig, FluxConfig
from jitjax.memory.weights import Divisions, block_kernels, part_bytes
from jitjax.models.attention import CPU_QUERIES, LOGITS_BYTES
from jitjax.sampler.plan import Plan

PLATFORMS = ("gpu", "cpu")
FLOAT32 = 4
WHOLE_PIXELS = 1024 * 1024
STRIP_PIXELS = 2**17
STRIPPED_LEVELS = 2
LEAST_ROWS = 2
"""These four are `jitjax.models.strips`', which would import Flax; a test compares them."""


@dataclass(frozen=True)
class Program:
    """What a compiled program needs on one device, in bytes.

    Attributes:
        name: what it computes.
        parts: the parts whose parameters it reads.
        weights: bytes of the parameters that it reads.
        inputs: bytes of its other arguments.
        temporaries: bytes that it allocates while it runs.
        outputs: bytes of its results.
    """

    name: str
    parts: tuple[str, ...]
    weights: int
    inputs: int
    temporaries: int
    outputs: int

    @property
    def beside_weights(self) -> int:
        """Bytes in addition to the parameters."""
        return self.inputs + self.temporaries + self.outputs

    @property
    def total(self) -> int:
        """All bytes; XLA's arguments, temporaries and outputs."""
        return self.weights + self.beside_weights


@dataclass(frozen=True)
class Settings:
    """What the bytes depend on.

    Attributes:
        config: configuration of the pipeline.
        grid: rows and columns of tokens.
        batch: number of pictures on one device.
        plan: the plan.
        dtype: name of the dtype of the parameters that are not quantised.
        quantise: quantisation of the kernels, or None.
        divisions: the mesh.
        platform: "gpu" or "cpu".
        attention: "cudnn" or "xla".
        guided: whether there are negative prompts, so that the transformer runs twice per step.
    """

    config: FluxConfig
    grid: tuple[int, int]
    batch: int
    plan: Plan
    dtype: str
    quantise: str | None
    divisions: Divisions
    platform: str
    attention: str
    guided: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of a number that is not quantised."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def tokens(self) -> int:
        """Number of tokens of a picture."""
        return self.grid[0] * self.grid[1]

    def weights(self, part: str, within: str = "") -> int:
        """Return the bytes of a part on one device; `within` as for `part_bytes`."""
        return part_bytes(self.config, part, self.dtype, self.quantise, self.divisions, within)

    def widened(self, part: str, stack: str, blocks: int) -> int:
        """Bytes of a stack's kernels in float32, which XLA makes of 16-bit ones on a CPU."""
        if self.platform != "cpu" or self.itemsize == FLOAT32 or self.quantise:
            return 0
        return FLOAT32 * blocks * sum(block_kernels(self.config, part, stack).values())


def encoders(s: Settings) -> Program:
    """Account for T5 and CLIP, which run as one program."""
    t5, text, b = s.config.t5, s.config.text_length, s.batch * (2 if s.guided else 1)
    shards = s.divisions.model
    inner, kernels = t5.num_heads * t5.d_kv // shards, block_kernels(s.config, "t5", "blocks")
    logits = 2 * t5.num_heads // shards * text * text * FLOAT32  # with their softmax
    # T5 overflows in float16, so it computes in float32.
    size = FLOAT32 if s.platform == "cpu" or s.dtype == "float16" else s.itemsize
    if s.platform == "cpu":
        out = kernels["attention/out"]
        attending = size * (kernels["mlp/gate_up"] + kernels["mlp/down"] + 2 * out)
        attending += b * (logits + size * text * t5.d_model)
        projecting = size * (sum(kernels.values()) + out)
        projecting += b * size * text * (t5.d_model + 3 * inner)
        temporaries = max(attending, projecting) + s.widened("t5", "blocks", t5.num_layers)
    else:
        features = t5.d_ff // shards
        attending = logits + 4 * size * text * inner  # query, key, value and the result
        gating = 3 * size * text * features  # gate and up, and their product
        stream = 2 * size * text * t5.d_model  # with its normalised copy
        # The blocks' kernels are copied out of their stack before a product.
        temporaries = size * kernels["mlp/gate_up"] // shards
        temporaries += b * (max(attending, gating) + stream)
    return Program(
        "text encoders",
        ("t5", "clip"),
        s.weights("t5") + s.weights("clip"),
        b * FLOAT32 * (text + s.config.clip.max_position_embeddings),
        temporaries,
        _conditioning(s),
    )


def _conditioning(s: Settings) -> int:
    t5_width, clip_width = s.config.t5.d_model, s.config.clip.hidden_size
    prompts = s.batch * (2 if s.guided else 1)
    return FLOAT32 * prompts * (s.config.text_length * t5_width + clip_width)


def stages(s: Settings) -> Iterator[Program]:
    """Account for the stages of the plan, and for finding the anchors that a sparse one needs."""
    n, text, b = s.tokens, s.config.text_length, s.batch
    states = FLOAT32 * b * n * s.config.transformer.out_channels
    results = 3 if s.plan.solver == "multistep" else 2  # the state, and the solver's
    seen = set()
    for budget in s.plan.budgets(n, text):
        slots = n if budget == n else s.plan.slots(budget, text)
        if slots in seen:
            continue
        seen.add(slots)
        anchors = 0
        if budget < n:
            pairs = FLOAT32 * b * n * slots  # each token with each anchor
            is_linear = s.plan.lift == "linear"
            anchors = b * (5 * n + 5 * slots) + (pairs if is_linear else 0)
            yield Program(
                f"anchors, {budget} of {n}",
                (),
                0,
                states + FLOAT32 * b * slots,
                5 * pairs if is_linear else pairs,
                anchors,
            )
        yield Program(
            f"transformer, {slots} of {n} tokens",
            ("transformer",),
            s.weights("transformer"),
            states + _conditioning(s) + anchors,
            _transformer_temporaries(s, slots) + _both_passes(s, slots),
            results * states,
        )


def _both_passes(s: Settings, slots: int) -> int:
    """Bytes that a loop over two passes takes in addition to one pass."""
    if not s.guided:
        return 0
    c = s.config.transformer
    size = FLOAT32 if s.platform == "cpu" else s.itemsize
    # Both conditionings as one array, both velocities, and the image stream before the blocks,
    # which is the same in both passes.
    return _conditioning(s) + s.batch * slots * (2 * FLOAT32 * c.out_channels + size * c.hidden)


def _transformer_temporaries(s: Settings, slots: int) -> int:
    c, text, shards = s.config.transformer, s.config.text_length, s.divisions.model
    double = block_kernels(s.config, "transformer", "double_blocks")
    single = block_kernels(s.config, "transformer", "single_blocks")
    size = FLOAT32 if s.platform == "cpu" else s.itemsize
    length = text + slots
    stream = size * s.batch * length * c.hidden  # an array with the width of the residual stream
    # Cosines and sines, and the text stream before the blocks.
    kept = s.batch * (FLOAT32 * length * c.attention_head_dim + size * text * c.hidden)
    if s.platform == "cpu":
        # A single block when GELU is applied: the stream; and by heads or features, QKV (3), the
        # result of attention (1), the product (4) and its GELU (4). If the blocks of queries do not
        # divide the tokens, attention is padded, and its result copied.
        queries = -(-length // CPU_QUERIES)
        padded = 1 if length % queries else 0
        gelu = stream + (12 + padded) * stream // shards + size * single["out"]
        # A double block when it begins: all its kernels, and the streams.
        begin = size * sum(double.values()) + 3 * stream
        widened = s.widened("transformer", "double_blocks", c.num_layers)
        widened += s.widened("transformer", "single_blocks", c.num_single_layers)
        return max(gelu, begin) + kept + widened
    # The stream and its normalised copy; the result of attention (1), the MLP's product (4), and
    # both joined after GELU (5).
    temporaries = 2 * stream + 10 * stream // shards + kept
    if s.attention == "xla":
        logits = FLOAT32 * s.batch * c.num_attention_heads // shards * length**2
        temporaries += 2 * min(LOGITS_BYTES, logits)
    if s.quantise or s.divisions.fsdp > 1:  # a kernel that is dequantised, or gathered
        temporaries += size * max(*double.values(), *single.values()) // shards
    return temporaries


def decoder(s: Settings) -> Program:
    """Account for the decoder, in strips where `jitjax.models.strips` has them."""
    config = s.config.autoencoder
    pixels_per_token = s.config.pixels_per_token
    height, width = (pixels_per_token * side for side in s.grid)
    # On a CPU the 16-bit decoder's temporaries are float32 too.
    size = FLOAT32 if s.platform == "cpu" else s.itemsize
    whole = height * width <= WHOLE_PIXELS
    values = _whole_decoder(config, height, width) if whole else _strips(config, height, width)
    return Program(
        "decoder",
        ("autoencoder",),
        s.weights("autoencoder", "decoder"),
        FLOAT32 * s.batch * s.tokens * s.config.transformer.out_channels,
        s.batch * size * values,
        FLOAT32 * s.batch * height * width * config.out_channels,
    )


def image_encoder(s: Settings) -> Program:
    """Account for the autoencoder's encoder, in strips where `jitjax.models.strips` has them."""
    config = s.config.autoencoder
    height, width = (s.config.pixels_per_token * side for side in s.grid)
    size = FLOAT32 if s.platform == "cpu" else s.itemsize
    whole = height * width <= WHOLE_PIXELS
    values = _whole_encoder(config, height, width) if whole else _strips_in(config, height, width)
    return Program(
        "image encoder",
        ("autoencoder",),
        s.weights("autoencoder", "encoder"),
        FLOAT32 * s.batch * height * width * config.in_channels,
        s.batch * size * values,
        FLOAT32 * s.batch * s.tokens * s.config.transformer.out_channels,
    )


def _whole_encoder(config: AutoencoderConfig, height: int, width: int) -> int:
    """Values alive in a resnet of the first level: three arrays; and the result of the last."""
    widths = config.block_out_channels
    return (3 * widths[0] + widths[-1] // config.factor**2) * height * width


def _strips_in(config: AutoencoderConfig, height: int, width: int) -> int:
    """Values alive when the first level is halved: its picture, the half, edges, two strips."""
    widths = config.block_out_channels
    multiple = 2 ** min(STRIPPED_LEVELS, len(widths) - 1)
    count = -(-height // max(STRIP_PIXELS // width, LEAST_ROWS))
    rows = max(-(-height // count), LEAST_ROWS)
    rows = -(-rows // multiple) * multiple
    count = -(-height // rows)
    padded = count * rows * width
    return widths[0] * (padded + padded // 4 + 4 * count * width + 2 * rows * width)


def _whole_decoder(config: AutoencoderConfig, height: int, width: int) -> int:
    """Values alive in the first resnet of a level: three times its input, and its result."""
    widths = config.block_out_channels
    return max(
        (3 * widths[min(i + 1, len(widths) - 1)] + w) * height * width // 4**i
        for i, w in enumerate(widths)
    )


def _strips(config: AutoencoderConfig, height: int, width: int) -> int:
    """Values alive in the last level: its picture and the one before, edges of strips, a strip."""
    widths, levels = config.block_out_channels, len(config.block_out_channels)
    first = max(0, levels - STRIPPED_LEVELS)
    ratio = config.factor // 2 ** max(first - 1, 0)  # image pixels per pixel of the first strips
    rows = max(STRIP_PIXELS // width // ratio, LEAST_ROWS)
    stored = height // ratio
    count = -(-stored // rows)
    rows = max(-(-stored // count), LEAST_ROWS)
    padded = count * rows * ratio * width
    before = widths[min(1, levels - 1)]
    pictures = padded * widths[0] + padded * before // 4
    edges = count * width * (4 * widths[0] + before)
    return pictures + edges + 5 * rows * ratio * width * widths[0]

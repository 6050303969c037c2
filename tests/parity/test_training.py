"""Training of the bundled model: windows and their positions, distillation, Muon, the grammar."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitjax  # noqa: E402
from training import grammar  # noqa: E402
from training.flow import distillation_target, implied_velocity, teacher_velocity  # noqa: E402
from training.model import TinyFlux, positions  # noqa: E402
from training.muon import orthogonalise  # noqa: E402
from training.scenes import caption, relation_holds, training_scene  # noqa: E402
from training.steps import StepKind, draw_batch, parse_mix, window_corner  # noqa: E402

pytestmark = pytest.mark.parity
TOKENIZERS = Path(jitjax.__file__).parent / "checkpoints" / "tiny"


def test_parse_mix():
    kinds, probabilities = parse_mix("128@4:1,512/16:2,512:1")
    assert kinds == [StepKind(128, 4), StepKind(512, 1, 16), StepKind(512)]
    assert [kind.grid for kind in kinds] == [8, 16, 32]
    np.testing.assert_allclose(probabilities, [0.25, 0.5, 0.25])


def test_window_contains_an_object_or_lies_within_one():
    rng = np.random.default_rng(0)

    def fits(centre: float, radius: float, start: int) -> bool:
        first, last = (centre - radius) * 32, (centre + radius) * 32
        return (start <= first and last <= start + 16) or (first <= start and start + 16 <= last)

    for _ in range(300):
        scene = training_scene(rng)
        row, column = window_corner(scene, 32, 16, rng)
        assert 0 <= row <= 16
        assert 0 <= column <= 16
        assert any(
            fits(thing.y, thing.radius, row) and fits(thing.x, thing.radius, column)
            for thing in scene.things
        )


def test_each_sample_may_have_its_own_positions():
    torch.manual_seed(0)
    model = TinyFlux(TOKENIZERS)
    for parameter in model.transformer.parameters():  # Zero-initialised layers would hide errors.
        torch.nn.init.normal_(parameter, std=0.1)
    x, sigma, guidance = torch.randn(2, 16, 64), torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.0])
    text, pooled = model.encode(["a red star", "two green rings"], 24)
    ids = positions(4, 4).repeat(2, 1, 1)
    ids[1, :, 1:] += torch.tensor([5.0, 16.0])
    with torch.no_grad():
        batched = model(x, sigma, guidance, text, pooled, ids)
        for i in range(2):
            row = slice(i, i + 1)
            single = model(x[row], sigma[row], guidance[row], text[row], pooled[row], ids[i])
            # The order of float32 sums depends on the batch size.
            torch.testing.assert_close(batched[row], single, rtol=1e-4, atol=1e-4)
        first_positions = model(x, sigma, guidance, text, pooled, ids[0])
    assert (first_positions[1] - batched[1]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 160), (2, 160, 96)])
def test_muon_orthogonalises(shape):
    """Singular values approach 1 as closely as the quintic allows; the dtype stays float32."""
    result = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert result.dtype == torch.float32
    assert result.shape == shape
    values = torch.linalg.svdvals(result)
    assert values.median() > 0.7
    assert values.max() < 1.25


def test_distillation_extrapolates_from_the_empty_prompt():
    torch.manual_seed(0)
    teacher = TinyFlux(TOKENIZERS).requires_grad_(False)
    for parameter in teacher.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, sigma, guidance = torch.randn(2, 16, 64), torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.0])
    prompts, ids = ["a red star", "two green rings"], positions(4, 4)
    empty, prompted = (
        teacher(x, sigma, guidance, *teacher.encode(texts, 24), ids)
        for texts in (["", ""], prompts)
    )
    target = distillation_target(
        teacher_velocity(teacher, x, sigma, guidance, prompts, ids, 24),
        teacher_velocity(teacher, x, sigma, guidance, ["", ""], ids, 24),
        guidance,
    )
    assert (prompted - empty).abs().max() > 1e-2
    # Guidance 1 gives the prompt's velocity, guidance 3 triples its distance from the empty one.
    torch.testing.assert_close(target[0], prompted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        target[1], empty[1] + 3 * (prompted[1] - empty[1]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        implied_velocity(target, empty, guidance), prompted, rtol=1e-5, atol=1e-5
    )


def test_grammar_labels_match_the_phrases():
    rng = np.random.default_rng(0)
    pairs = 0
    for _ in range(200):
        scene = training_scene(rng)
        text = caption(scene, rng)
        phrases = grammar.phrase_labels(scene, text)
        for (start, end, labels), thing in zip(phrases, scene.things, strict=False):
            words = text[start:end]
            assert thing.shape in words
            assert thing.colour in words
            assert "background" not in words
            values = [
                tuple(names)[label]
                for names, label in zip(grammar.HEADS.values(), labels, strict=True)
            ]
            assert values[:2] == [thing.shape, thing.colour]
            assert values[2:4] == [thing.size, thing.texture]
        if len(phrases) == 2:
            places = [grammar.PLACES[labels[-1]] for _, _, labels in phrases]
            assert relation_holds(places[0], *scene.things)
            assert relation_holds(places[1], *scene.things[::-1])
            pairs += 1
    assert pairs > 40


def test_grammar_labels_only_words_of_phrases():
    tokenizer = TinyFlux(TOKENIZERS).t5_tokenizer
    ids, labels = grammar.labelled_batch(tokenizer, np.random.default_rng(1), 16)
    assert ids.shape == (16, grammar.WIDTH)
    assert labels.shape == (16, grammar.WIDTH, len(grammar.HEADS))
    for row, label in zip(ids, labels, strict=True):
        words = tokenizer.convert_ids_to_tokens(row.tolist())
        labelled = {
            word.strip("▁") for word, values in zip(words, label, strict=True) if values[0] >= 0
        }
        assert not labelled & {"on", "against", "background", "and", "left", "</s>", "<pad>"}
        assert labelled & set(grammar.COLOURS)
        assert any(word.startswith(shape) for word in labelled for shape in grammar.SHAPES)


def test_stored_encoder_is_loaded_unchanged():
    model = TinyFlux(TOKENIZERS)
    checkpoint = {"weights": model.state_dict(), "average": dict(model.named_parameters())}
    encoder = TinyFlux(TOKENIZERS).t5  # Its embedding has two names in the state dictionary.
    grammar.store_encoder(checkpoint, encoder)
    for weights in checkpoint.values():
        model = TinyFlux(TOKENIZERS)
        model.load_state_dict(weights, strict=False)
        for name, value in encoder.state_dict().items():
            torch.testing.assert_close(model.t5.state_dict()[name], value, rtol=0, atol=0)


class FakeLatents:
    """Stands in for `Latents`: random scenes with zeros as their latents."""

    count = 512

    def batch(self, position, size):
        scenes = [training_scene(np.random.default_rng((position, i))) for i in range(size)]
        return torch.zeros(size, 16, 64, 64), scenes


def test_small_windows_prefer_two_objects_and_high_sigma():
    for kind, least_pairs, least_share in (
        (StepKind(512, 1, 8), 40, 0.8),
        (StepKind(512, 1, 16), 0, 0.25),
    ):
        x0, _, sigma, _, captions, _, ids = draw_batch(FakeLatents(), kind, (0, 1), 48, 0, 0.0)
        assert x0.shape == (48, kind.grid**2, 64)
        assert ids.shape == (48, kind.grid**2, 3)
        pairs = sum(bool(grammar.SEPARATOR.search(text)) for text in captions)
        assert pairs >= least_pairs
        high = 0.978 if kind.is_within_thing else 0.949  # Sigma 0.85 and 0.7, shifted by 8.
        assert (sigma > high).float().mean() >= least_share
        assert sigma.max() <= 1


def test_wide_windows_prefer_large_objects_rings_and_crosses():
    large, large_or_hard, large_and_hard = 0, 0, 0
    for seed in range(20):
        *_, captions, weight, ids = draw_batch(
            FakeLatents(), StepKind(512, 1, 24), (seed,), 7, 0, 0.0
        )
        assert weight.shape == (7, 24 * 24, 1)
        assert ids.max() <= 31
        for text in captions:
            is_large = any(word in text.split() for word in ("large", "big"))
            is_hard = any(word in text for word in ("ring", "cross"))
            large += is_large
            large_or_hard += is_large or is_hard
            large_and_hard += is_large and is_hard
    # Of 140 captions. The shares among all scenes are 1/2, 1/7 and 1/20.
    assert large_or_hard > 133
    assert large > 50
    assert large_and_hard > 35

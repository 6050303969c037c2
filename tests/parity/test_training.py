"""How the bundled model is trained: its windows, where they lie and at which positions; Muon."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jitjax  # noqa: E402
from training import grammar  # noqa: E402
from training.flow import (  # noqa: E402
    Kind,
    corner,
    distilled,
    draw,
    frozen,
    implied,
    parse_mix,
)
from training.model import TinyFlux, positions  # noqa: E402
from training.muon import orthogonalise  # noqa: E402
from training.scenes import caption, holds, training_scene  # noqa: E402

pytestmark = pytest.mark.parity
TOKENIZERS = Path(jitjax.__file__).parent / "checkpoints" / "tiny"


def test_mix_names_kinds_and_shares():
    kinds, shares = parse_mix("128@4:1,512/16:2,512:1")
    assert kinds == [Kind(128, 4), Kind(512, 1, 16), Kind(512)]
    assert [kind.grid for kind in kinds] == [8, 16, 32]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25])


def test_a_window_holds_a_thing_or_lies_within_one():
    rng = np.random.default_rng(0)

    def fits(centre: float, radius: float, start: int) -> bool:
        first, last = (centre - radius) * 32, (centre + radius) * 32
        return (start <= first and last <= start + 16) or (first <= start and start + 16 <= last)

    for _ in range(300):
        scene = training_scene(rng)
        row, column = corner(scene, 32, 16, rng)
        assert 0 <= row <= 16
        assert 0 <= column <= 16
        assert any(fits(t.y, t.radius, row) and fits(t.x, t.radius, column) for t in scene.things)


def test_each_picture_of_a_batch_may_have_positions_of_its_own():
    torch.manual_seed(0)
    model = TinyFlux(TOKENIZERS)
    for p in model.transformer.parameters():  # many start at zero, and nothing would be seen
        torch.nn.init.normal_(p, std=0.1)
    x, sigma, told = torch.randn(2, 16, 64), torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.0])
    states, pooled = model.encode(["a red star", "two green rings"], 24)
    ids = positions(4, 4).repeat(2, 1, 1)
    ids[1, :, 1:] += torch.tensor([5.0, 16.0])
    with torch.no_grad():
        together = model(x, sigma, told, states, pooled, ids)
        for i in range(2):
            one = slice(i, i + 1)
            alone = model(x[one], sigma[one], told[one], states[one], pooled[one], ids[i])
            # float32, sums in another order
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-4)
        first = model(x, sigma, told, states, pooled, ids[0])
    assert (first[1] - together[1]).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(3, 48, 48), (2, 96, 160), (2, 160, 96)])
def test_muon_orthogonalises(shape):
    """Singular values come near to 1, as near as the quintic brings them, and float32 stays."""
    found = orthogonalise(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert found.dtype == torch.float32
    assert found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.median() > 0.7
    assert values.max() < 1.25


def test_guidance_is_taught_along_the_line_from_the_empty_prompt():
    torch.manual_seed(0)
    teacher = TinyFlux(TOKENIZERS).requires_grad_(False)
    for p in teacher.transformer.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, sigma, told = torch.randn(2, 16, 64), torch.tensor([0.3, 0.8]), torch.tensor([1.0, 3.0])
    texts, ids = ["a red star", "two green rings"], positions(4, 4)
    without, prompted = (
        teacher(x, sigma, told, *teacher.encode(words, 24), ids) for words in (["", ""], texts)
    )
    taught = distilled(
        frozen(teacher, x, sigma, told, texts, ids, 24),
        frozen(teacher, x, sigma, told, ["", ""], ids, 24),
        told,
    )
    assert (prompted - without).abs().max() > 1e-2
    # float32; guidance 1 is the prompt's own velocity, guidance 3 thrice as far from the other
    torch.testing.assert_close(taught[0], prompted[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        taught[1], without[1] + 3 * (prompted[1] - without[1]), rtol=1e-5, atol=1e-5
    )
    # Refining compares the plain velocity in what was taught, guidance by guidance.
    torch.testing.assert_close(implied(taught, without, told), prompted, rtol=1e-5, atol=1e-5)


def test_the_grammar_names_the_things_of_each_phrase():
    rng = np.random.default_rng(0)
    two = 0
    for _ in range(200):
        scene = training_scene(rng)
        text = caption(scene, rng)
        phrases = grammar.answers(scene, text)
        for (start, end, facts), thing in zip(phrases, scene.things, strict=False):
            words = text[start:end]
            assert thing.shape in words
            assert thing.colour in words
            assert "background" not in words
            said = [tuple(names)[k] for names, k in zip(grammar.HEADS.values(), facts, strict=True)]
            assert said[:2] == [thing.shape, thing.colour]
            assert said[2:4] == [thing.size, thing.texture]
        if len(phrases) == 2:
            places = [grammar.PLACES[facts[-1]] for _, _, facts in phrases]
            assert holds(places[0], *scene.things)
            assert holds(places[1], *scene.things[::-1])
            two += 1
    assert two > 40


def test_the_grammar_labels_the_words_of_phrases_alone():
    tokenizer = TinyFlux(TOKENIZERS).t5_tokenizer
    ids, labels = grammar.batch(tokenizer, np.random.default_rng(1), 16)
    assert ids.shape == (16, grammar.WIDTH)
    assert labels.shape == (16, grammar.WIDTH, len(grammar.HEADS))
    for row, label in zip(ids, labels, strict=True):
        words = tokenizer.convert_ids_to_tokens(row.tolist())
        named = {word.strip("▁") for word, facts in zip(words, label, strict=True) if facts[0] >= 0}
        assert not named & {"on", "against", "background", "and", "left", "</s>", "<pad>"}
        assert named & set(grammar.COLOURS)
        assert any(word.startswith(shape) for word in named for shape in grammar.SHAPES)


def test_a_stored_encoder_is_the_one_that_is_loaded():
    model = TinyFlux(TOKENIZERS)
    saved = {"weights": model.state_dict(), "average": dict(model.named_parameters())}
    taught = TinyFlux(TOKENIZERS).t5  # its embedding too, which has two names
    grammar.store(saved, taught)
    for part in saved.values():
        model = TinyFlux(TOKENIZERS)
        model.load_state_dict(part, strict=False)
        for name, value in taught.state_dict().items():
            torch.testing.assert_close(model.t5.state_dict()[name], value, rtol=0, atol=0)


class Drawn:
    """Scenes without their latents, in the place of `Latents`."""

    count = 512

    def batch(self, position, size):
        scenes = [training_scene(np.random.default_rng((position, i))) for i in range(size)]
        return torch.zeros(size, 16, 64, 64), scenes


def test_windows_within_a_thing_ask_which_it_is():
    for kind, differ, high in ((Kind(512, 1, 8), 40, 0.8), (Kind(512, 1, 16), 0, 0.25)):
        x0, _, sigma, _, captions, _, ids = draw(Drawn(), kind, (0, 1), 48, 0, 0.0)
        assert x0.shape == (48, kind.grid**2, 64)
        assert ids.shape == (48, kind.grid**2, 3)
        assert sum(bool(grammar.BETWEEN.search(text)) for text in captions) >= differ
        least = 0.978 if kind.within else 0.949  # 0.85 and 0.7, shifted by 8
        assert (sigma > least).float().mean() >= high
        assert sigma.max() <= 1


def test_wide_windows_are_of_large_things_rings_and_crosses():
    large, either, both = 0, 0, 0
    for seed in range(20):
        *_, captions, weight, ids = draw(Drawn(), Kind(512, 1, 24), (seed,), 7, 0, 0.0)
        assert weight.shape == (7, 24 * 24, 1)
        assert ids.max() <= 31
        for text in captions:
            big = any(word in text.split() for word in ("large", "big"))
            hard = any(word in text for word in ("ring", "cross"))
            large, either, both = large + big, either + (big or hard), both + (big and hard)
    assert either > 133  # of 140; of all scenes one in two
    assert large > 50  # of all scenes one in seven
    assert both > 35  # of all scenes one in twenty

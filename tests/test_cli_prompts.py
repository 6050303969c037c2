"""Lists of prompts on the command line, in this process with the bundled checkpoint."""

from __future__ import annotations

import fcntl
import json
import os
import re

import flat_program
import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import cli, images, list_run

pytestmark = pytest.mark.usefixtures("load_once")

OPTIONS = ("--size", "32", "--plan", "dense", "--steps", "1")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Write a list, run it in the working directory; return status, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def run_list(lines: list[str], *options: str) -> tuple[int, str, str]:
        (tmp_path / "list.txt").write_text("\n".join(lines))
        try:
            cli.main(["--prompts", "list.txt", *OPTIONS, *options])
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run_list


@pytest.fixture
def flat(monkeypatch) -> None:
    """Pictures are flat, which takes no programs."""
    for name in ("encode_prompt", "sample"):
        monkeypatch.setattr(jitjax, name, getattr(jitjax, name))  # to be as before at the end
    flat_program.install()


@pytest.fixture
def batches(monkeypatch) -> list[tuple[int, int]]:
    """The width and the length of each batch that `sample` is asked for from here on."""
    made: list[tuple[int, int]] = []
    sample = jitjax.sample

    def record(params, prompts, **options):
        made.append((options["width"], len(prompts)))
        return sample(params, prompts, **options)

    monkeypatch.setattr(jitjax, "sample", record)
    return made


def pictures(folder) -> dict[str, tuple[np.ndarray, dict]]:
    """Prompt and seed -> pixels and settings of every file in a folder."""
    found = {}
    for path in folder.iterdir():
        with Image.open(path) as image:
            settings = json.loads(image.text["settings"])
            name = f"{image.text['prompt']} {settings['seed']}"
            assert name not in found
            found[name] = np.asarray(image).astype(int), settings
    return found


def identities(folder) -> dict[str, tuple[int, int]]:
    """Name of each file -> numbers that change if it is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_pictures_are_those_of_single_prompts(run, tmp_path, capsys):
    """To the bit with the default batch of 1."""
    status, out, _ = run(["a red circle", "a blue star"], "--seed", "7", "--count", "2")
    assert status == 0
    single = tmp_path / "single.png"
    cli.main(["a blue star", *OPTIONS, "--seed", "8", "-o", str(single)])
    made = pictures(tmp_path / "list-pictures")
    assert sorted(made) == ["a blue star 7", "a blue star 8", "a red circle 7", "a red circle 8"]
    pixels, settings = made["a blue star 8"]
    with Image.open(single) as image:
        np.testing.assert_array_equal(pixels, np.asarray(image))
        assert settings == json.loads(image.text["settings"])
    assert re.match(r"list-pictures/a-red-circle-7-[0-9a-f]{12}\.png: line 1, dense, seed 7,", out)
    assert out.count("\n") == 4


@pytest.mark.slow
def test_pictures_of_batches_are_those_of_single_prompts(run, tmp_path):
    """By a level of 255: programs of other batch sizes round differently."""
    assert run(["a blue star"], "-o", "single", "--seed", "8")[0] == 0
    pixels = pictures(tmp_path / "single")["a blue star 8"][0]
    assert run(["a red circle", "a blue star", "a ring"], "-o", "p", "--batch", "3")[0] == 0
    assert np.abs(pictures(tmp_path / "p")["a blue star 0"][0] - pixels).mean() > 3  # other seed
    assert run(["x", "a blue star", "y"], "-o", "q", "--batch", "3", "--seed", "8")[0] == 0
    assert np.abs(pictures(tmp_path / "q")["a blue star 8"][0] - pixels).max() <= 1


def test_lines_of_equal_size_and_plan_are_made_together(run, tmp_path, flat, batches):
    lines = [json.dumps({"prompt": f"star {i}", "size": "48x32"} | more) for i, more in
             enumerate([{}, {"size": 32}, {}, {"seed": 3}, {"size": "32"}, {}, {"plan": "dense"},
                        {"prompt": "star 0", "seed": 0}, {"size": 32}])]  # fmt: skip
    status, _, error = run(lines, "--batch", "4")
    assert status == 0
    assert batches == [(48, 3), (48, 3), (32, 3)]  # five wide ones: one is repeated
    made = pictures(tmp_path / "list-pictures")
    assert len(made) == 8
    assert made["star 0 0"][0].shape == (32, 48, 3)
    assert made["star 3 3"][1]["seed"] == 3
    assert "which is made once: 1; for example line 8, as line 1\n" in error
    assert "8.0/8 pictures" in error


@pytest.mark.parametrize(
    ("in_list", "missing", "most", "expected"),
    [(200, 200, 64, 50), (17, 17, 8, 6), (3, 3, 8, 3), (200, 26, 64, 50), (200, 25, 64, 25),
     (200, 1, 64, 1), (5, 5, 1, 1), (8, 8, 8, 8), (9, 9, 8, 5)],
)  # fmt: skip
def test_batch_sizes(in_list, missing, most, expected):
    assert list_run._batch_size(in_list, missing, most) == expected


def test_an_edited_list_makes_what_is_new(run, tmp_path, batches):
    folder = tmp_path / "list-pictures"
    assert run(["a red circle", "a blue star", "a ring"])[0] == 0
    before = identities(folder)
    status, out, error = run(["a cross", "a ring", "", "a red circle"])
    assert status == 0
    assert out.count("\n") == 1
    assert "3 pictures, 2 of them in 'list-pictures' already" in error
    assert identities(folder).items() > before.items()
    assert len(list(folder.iterdir())) == 4
    del batches[:]
    # Other settings are other pictures, beside the first ones.
    assert run(["a ring"], "--guidance", "2")[0] == 0
    assert len(list(folder.iterdir())) == 5
    assert len(batches) == 1


def test_nothing_is_loaded_if_all_is_made(run, monkeypatch):
    assert run(["a red circle"])[0] == 0
    monkeypatch.setattr(jitjax, "load", lambda path: pytest.fail("loaded"))
    assert run(["a red circle"])[:2] == (0, "")


def test_failures_are_told_by_line_and_the_rest_is_made(run, flat, tmp_path):
    sample, tokenize, write = jitjax.sample, list_run.tokenize, images.write_png

    def sample_with_nan(params, prompts, **options):
        made = np.array(sample(params, prompts, **options))
        for i, prompt in enumerate(prompts):
            if prompt == "not finite":
                made[i, 0] = np.nan
        return made

    def refuse(folder, prompt, config):
        if prompt == "refused":
            raise ValueError("token id 9 is outside")
        return tokenize(folder, prompt, config)

    def full_disk(path, image, prompt, *rest, **options):
        if prompt == "no space":
            raise OSError(28, "No space left on device", str(path))
        write(path, image, prompt, *rest, **options)

    lines = ["a star", "{broken}", "not finite", "# c", "refused", "no space", "a ring"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jitjax, "sample", sample_with_nan)
        patch.setattr(list_run, "tokenize", refuse)
        patch.setattr(images, "write_png", full_disk)
        status, out, error = run(lines, "--batch", "3")
    assert status == 1
    assert sorted(pictures(tmp_path / "list-pictures")) == ["a ring 0", "a star 0"]
    assert out.count("\n") == 2
    assert "jitjax: broken lines, left out and explained at the end: 2\n" in error
    told = [line for line in error.splitlines() if line.startswith("jitjax: line ")]
    for line, (number, text) in zip(told, [(2, "it begins with {"), (3, "the picture of seed 0 is"),
                                           (5, "token id 9"), (6, "[Errno 28] No space")],
                                    strict=True):  # fmt: skip
        assert line.startswith(f"jitjax: line {number}: {text}")
    # What failed is tried again, and only that.
    status, out, _ = run(["a star", "not finite", "refused", "no space", "a ring"], "--batch", "3")
    assert (status, out.count("\n")) == (0, 3)


def test_a_disk_that_is_full_for_all_files_ends_the_run(run, monkeypatch):
    def full_disk(path, *_, **__):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(images, "write_png", full_disk)
    monkeypatch.setattr(list_run, "WRITE_FAILURES", 3)
    status, _, error = run([f"star {i}" for i in range(9)])
    assert status == 2
    assert error.count("No space left") == 3
    assert "0 of 9 pictures are made; the same command goes on with the others" in error
    assert error.endswith("jitjax: error: the last 3 pictures could not be written\n")


def test_lines_that_do_not_fit_the_options(run, tmp_path):
    lines = ['{"prompt": "a", "plan": "4x"}', '{"prompt": "b", "size": 40}', '{"prompt": "c"}']
    lines.append('{"prompt": "d", "seed": 18446744073709551615}')
    status, _, error = run(lines, "--count", "2")
    assert status == 1
    assert sorted(pictures(tmp_path / "list-pictures")) == ["c 0", "c 1"]
    assert re.search(r"line 1: .*at least one step in every stage", error)
    assert "line 2: height is 40 pixels; expected a multiple of 16" in error
    assert "line 4: seed is 18446744073709551615 and --count 2; expected seeds below" in error


def test_damaged_files_are_made_again(run, tmp_path, monkeypatch):
    names = ["a star", "a ring", "a cross", "a square", "a circle"]
    assert run(names)[0] == 0
    folder = tmp_path / "list-pictures"
    before = identities(folder)
    paths = sorted(folder.iterdir())
    data = paths[0].read_bytes()
    flipped = bytearray(data)
    flipped[-30] ^= 1  # in the pixels' data
    for path, content in zip(paths, (b"", data[:-40], bytes(flipped), b"text"), strict=False):
        path.write_bytes(content)
    status, out, error = run(names)
    assert status == 0
    assert out.count("\n") == 4
    assert error.count("is damaged, and to be made again") == 4
    assert len(pictures(folder)) == 5
    assert identities(folder)[paths[4].name] == before[paths[4].name]


def test_other_files_are_not_replaced(run, tmp_path, monkeypatch):
    names = ["a star", "a ring", "a cross"]
    assert run(names)[0] == 0
    folder = tmp_path / "list-pictures"
    star = next(folder.glob("a-star*"))
    star.write_bytes(next(folder.glob("a-ring*")).read_bytes())
    next(folder.glob("a-cross*")).unlink()
    status, out, error = run(names)
    assert (status, out) == (2, "")  # before anything is made
    assert re.search(r"a-star-0-\w+\.png' is not the picture of line 1: it stores another", error)
    Image.new("RGB", (32, 32)).save(star)  # a picture without settings
    assert run(names)[0] == 2
    before = identities(folder)
    status, out, _ = run(names, "--overwrite")
    assert (status, out.count("\n")) == (0, 2)
    ring = next(folder.glob("a-ring*")).name
    assert identities(folder)[ring] == before[ring]  # what is right is kept even so
    assert len(pictures(folder)) == 3
    star.unlink()
    star.mkdir()
    status, _, error = run(names)
    assert status == 2
    assert "exists and is not a file" in error


def test_files_that_appear_meanwhile(run, flat, tmp_path, monkeypatch):
    """A right one is kept; another is not replaced."""
    assert run(["a star", "a ring", "x"], "-o", "made", "--batch", "3")[0] == 0
    ring, star = sorted((tmp_path / "made").glob("a-*"))
    sample = jitjax.sample

    def meanwhile(params, prompts, **options):
        folder = tmp_path / "list-pictures"
        (folder / star.name).write_bytes(star.read_bytes())
        (folder / ring.name).write_bytes(star.read_bytes())
        return sample(params, prompts, **options)

    monkeypatch.setattr(jitjax, "sample", meanwhile)
    status, out, error = run(["a star", "a ring", "x"], "--batch", "3")
    assert status == 1
    assert out.count("\n") == 2
    assert "jitjax: line 2: [Errno 17] File exists" in error


def test_one_run_at_a_time(run, tmp_path):
    folder = tmp_path / "list-pictures"
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    status, _, error = run(["a star"])
    assert status == 2
    assert "another run of jitjax is making pictures in 'list-pictures'" in error
    os.close(descriptor)  # as when the process ends
    assert run(["a star"])[0] == 0


def test_leftovers_of_killed_runs_are_removed(run, tmp_path):
    folder = tmp_path / "list-pictures"
    folder.mkdir()
    for name, age in ((".0123abcd.tmp", 3600), (".4567abcd.tmp", 0), (".other.tmp", 3600)):
        (folder / name).touch()
        os.utime(folder / name, (os.stat(folder).st_mtime - age,) * 2)
    assert run(["a star"])[0] == 0
    assert sorted(p.name for p in folder.glob(".*")) == [".4567abcd.tmp", ".other.tmp"]


@pytest.mark.slow
def test_what_the_encoders_do_not_see_is_told_by_line(run):
    status, _, error = run(["a star", "", "a star " * 200], "--batch", "3")
    assert status == 0
    assert "jitjax: the prompt of line 3 has more than 77 CLIP tokens; CLIP does not see" in error
    assert "prompt[" not in error


@pytest.mark.slow
def test_names_of_any_prompt(run, tmp_path):
    long = "x" * 300
    assert run(["Ein GRÜNER Kreis, 3/4 & ../..", "一只猫", "猫", long])[0] == 0
    names = sorted(path.name for path in (tmp_path / "list-pictures").iterdir())
    patterns = ["ein-gruner-kreis-3-4-0-HASH", "picture-0-HASH", "picture-0-HASH", "x{40}-0-HASH"]
    for name, pattern in zip(names, patterns, strict=True):
        assert re.fullmatch(pattern.replace("HASH", r"[0-9a-f]{12}\.png"), name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a star", "--prompts", "list.txt"], "there are a prompt and --prompts; expected one"),
        ([], "nothing to make; expected a prompt, --prompts FILE or"),
        (["a star", "--batch", "2"], "--batch is for --prompts"),
        (["--prompts", "list.txt", "--batch", "0"], "--batch is 0; expected 1 to 100000"),
        (["--prompts", "list.txt", "--count", "0"], "--count is 0"),
        (["--prompts", "list.txt", "--size", "100"], "height is 100 pixels"),
        (["--prompts", "list.txt", "-o", "a.png"], "--out is 'a.png'; expected a folder"),
        (["--prompts", "list.txt", "-o", "list.txt"], "--out is 'list.txt', a file; expected a"),
        (["--prompts", "list.txt", "-o", "no/p"], "expected the folder 'no' to exist"),
        (["--prompts", "list.txt", "--checkpoint", "no"], "no checkpoint at 'no'"),
        (["--prompts", "none.txt"], "there is no file 'none.txt'"),
        (["--prompts", "."], "--prompts is the folder '.'"),
        (["--prompts", "broken.txt"], "no line of 'broken.txt' can be used:\n  line 2: it is not"),
        (["--prompts", "empty.txt"], "'empty.txt' has no prompts"),
    ],
)
def test_errors_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("a star")
    (tmp_path / "broken.txt").write_text("# c\n{a}\n")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.txt", "empty.txt", "list.txt"]

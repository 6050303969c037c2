"""What the commands do with their arguments: repeated options, names, seeds, LoRA files."""

from __future__ import annotations

import io
import os
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import jitjax
from jitjax import cli, command, images, picture, prompt_list
from jitjax.convert import __main__ as convert

IMAGE = np.zeros((16, 16, 3), np.uint8)


def status_of(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as info:
        cli.main(list(arguments))
    return info.value.code


@pytest.mark.parametrize("option", ["-o", "--seed", "--steps", "--count", "--guidance", "--size"])
def test_a_repeated_option_is_refused(option, capsys):
    assert status_of("x", option, "1", option, "2") == 2
    assert "given twice; expected once" in capsys.readouterr().err


def test_repeated_options_of_a_conversion_add_or_are_refused(capsys):
    parser = convert.build_parser()
    options = parser.parse_args(["x", "--lora", "a", "--lora", "b", "c", "--parts", "t5",
                                 "--parts", "clip"])  # fmt: skip
    assert options.lora == ["a", "b", "c"]
    assert options.parts == ["t5", "clip"]
    for option in ("--out", "--dtype", "--transformer", "--verify", "--tokenizers"):
        with pytest.raises(SystemExit):
            parser.parse_args([option, "float32", option, "float32"])
        assert "given twice" in capsys.readouterr().err
    assert convert.main(["--verify", "x", "--out", "y"]) == 2
    assert convert.main(["--lora", "a", "--out", "y"]) == 2
    error = capsys.readouterr().err
    assert "--verify does not go with --out" in error
    assert "expected SOURCE before --lora" in error


def test_lora_names_may_have_colons(tmp_path):
    def parse(text: str) -> tuple[str, float]:
        path, scale = convert.parse_lora(text)
        return str(path), scale

    assert parse(r"C:\loras\ink.safetensors") == (r"C:\loras\ink.safetensors", 1.0)
    assert parse(r"C:\x.safetensors:0.7") == (r"C:\x.safetensors", 0.7)
    assert parse("style:v2.safetensors") == ("style:v2.safetensors", 1.0)
    assert parse("a.safetensors:-0.5") == ("a.safetensors", -0.5)
    file = tmp_path / "style:2"
    file.touch()
    assert parse(str(file)) == (str(file), 1.0)
    for scale in ("nan", "inf", "-inf"):
        with pytest.raises(ValueError, match="expected a finite number"):
            convert.parse_lora(f"a.safetensors:{scale}")
    for text in ("", ":0.5"):
        with pytest.raises(ValueError, match="empty; expected FILE"):
            convert.parse_lora(text)


def test_seeds_of_64_bits():
    data = lambda seed: tuple(map(int, jax.random.key_data(picture.seed_keys([seed])[0])))  # noqa: E731
    for seed in (0, 1, 12345, 2**31, 2**32 - 1):
        assert data(seed) == (0, seed) == tuple(map(int, jax.random.key_data(jax.random.key(seed))))
    assert data(2**32) == (1, 0)
    assert data(2**64 - 1) == (2**32 - 1, 2**32 - 1)
    for first, count in ((-1, 1), (2**64, 1), (2**64 - 1, 2), (10**23, 1)):
        with pytest.raises(ValueError, match="--seed is"):
            picture.consecutive_seeds(first, count)


def test_files_are_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("jitjax.png", "jitjax-1.png", "jitjax-2.png"):
        path = images.Outputs(None, [0], False).write(0, IMAGE, "p", {})
        assert str(path) == name
    with pytest.raises(FileExistsError, match="--overwrite to replace it"):
        images.Outputs(tmp_path / "jitjax.png", [0], False)
    images.Outputs(tmp_path / "jitjax.png", [0], True)
    outputs = images.Outputs(tmp_path / "new.png", [0], False)
    (tmp_path / "new.png").write_text("appeared meanwhile")
    assert outputs.write(0, IMAGE, "p", {}).name == "new-1.png"
    assert (tmp_path / "new.png").read_text() == "appeared meanwhile"
    (tmp_path / "d.png").mkdir()
    with pytest.raises(FileExistsError, match="not a file"):
        images.Outputs(tmp_path / "d.png", [0], True)
    with pytest.raises(OSError, match="--out: no file can be made in the folder"):
        images.Outputs(Path("/sys/a.png"), [0], False)
    with pytest.raises(OSError, match="too long"):
        images.Outputs(tmp_path / ("a" * 252 + ".png"), [0], False)
    longest = tmp_path / ("a" * 251 + ".png")
    assert images.Outputs(longest, [0], False).write(0, IMAGE, "p", {}) == longest
    assert not list(tmp_path.glob(".*"))


def test_writes_of_one_file_at_the_same_time(tmp_path):
    path = tmp_path / "a.png"
    with ThreadPoolExecutor(8) as pool:
        write = images.write_png
        for done in [pool.submit(write, path, IMAGE, "a", {"seed": i}) for i in range(100)]:
            done.result()
    assert list(tmp_path.iterdir()) == [path]
    assert Image.open(path).size == (16, 16)


def test_settings_are_json_and_pictures_finite(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        images.write_png(tmp_path / "a.png", IMAGE, "p", {"guidance": float("nan")})
    with pytest.raises(ValueError, match="seed 3 is not written: 100% of its values"):
        images.to_pixels(np.full((4, 4, 3), np.nan, np.float32), 3)
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_one_line(capsys):
    def run(error: Exception) -> int:
        def body() -> int:
            raise error

        return command.run(
            body, error_prefix="e: ", cleanup=lambda: None, grace=1.0, memory_hint="shrink"
        )

    for error in (
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes."),
        RuntimeError("can't start new thread"),
    ):
        assert run(error) == 2
        text = capsys.readouterr().err
        assert text.startswith("e: out of memory; shrink (")
        assert text.count("\n") == 1
    with pytest.raises(KeyError):
        run(KeyError("a bug"))


def test_what_is_replaced_keeps_its_permissions(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.touch(0o600)
    images.Outputs(path, [0], True).write(0, IMAGE, "p", {})
    assert path.stat().st_mode & 0o777 == 0o600
    assert Image.open(path).size == (16, 16)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write to all
    with pytest.raises(PermissionError, match=r"a\.png' is read-only; expected another name"):
        images.Outputs(path, [0], True)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "100", "height is 100 pixels; expected a multiple of 16 from 16 to 8192"),
        ("--size", "0", "height is 0 pixels"),
        ("--size", "99999x64", "width is 99999 pixels"),
        ("--size", "1e3", "--size is '1e3'"),
        ("--size", "\uff16\uff14", "--size is"),  # digits, but not of ASCII
        ("--steps", "99999999999", "--steps is 99999999999; expected 1 to 100000"),
        ("--guidance", "1e400", "--guidance is inf; expected a finite number"),
        ("--count", "100001", "--count is 100001; expected 1 to 100000"),
        ("--checkpoint", "folder", "--checkpoint folder has no t5, autoencoder; expected"),
    ],
)
def test_said_before_loading(tmp_path, monkeypatch, capsys, option, value, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    metadata = {"config": jitjax.FluxConfig(), "parts": ["clip", "transformer"]}
    monkeypatch.setattr(cli, "read_metadata", lambda folder: metadata)
    monkeypatch.setattr(jitjax, "load", lambda path: pytest.fail("loaded"))
    assert status_of("x", option, value) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"jitjax: error: {message}")
    assert error.count("\n") == 1


def test_count_keeps_one_picture_at_a_time(tmp_path, monkeypatch):
    """Memory does not grow with the count: one picture is asked for, written and let go."""
    made: list[weakref.ref[np.ndarray]] = []

    def sample(params, conditioning, *, key, **others):
        assert key.shape == (1,)
        assert len(list(tmp_path.glob("*.png"))) == len(made)
        assert sum(reference() is not None for reference in made) <= 1
        images = np.zeros((1, 16, 16, 3), np.float32)
        made.append(weakref.ref(images))
        return images

    monkeypatch.setattr(jitjax, "load", lambda path, **others: None)
    monkeypatch.setattr(jitjax, "encode_prompt", lambda params, prompt: None)
    monkeypatch.setattr(jitjax, "sample", sample)
    monkeypatch.setattr(cli, "_enable_compilation_cache", lambda: None)
    cli.main(["x", "-o", str(tmp_path / "a.png"), "--count", "24", "--seed", "3"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"a-{seed}.png" for seed in range(3, 27)
    )


def test_prompts_that_are_no_text(monkeypatch):
    for data, message in (
        ("a ring".encode("utf-16-le"), "a zero byte at position 1; expected UTF-8"),
        ("a ring".encode("utf-16"), r"not UTF-8 \(b'\\xff' at position 0\)"),
        (b" \n", "is empty"),
        (b"a" * (2**20 + 1), "more than 1048576 bytes"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        with pytest.raises(ValueError, match=f"^standard input .*{message}"):
            prompt_list.read_prompt("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfa ring\n")))
    assert prompt_list.read_prompt("-") == "a ring"
    with pytest.raises(ValueError, match="the prompt has a zero byte at position 1"):
        prompt_list.read_prompt("a\0b")
    assert prompt_list.read_prompt("") == ""  # the empty prompt


def test_folders_that_are_gone_and_long_names_are_clear(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert status_of("x") == 2
    error = "the working directory is gone (No such file or directory); change to another one"
    assert capsys.readouterr().err == f"jitjax: error: {error}\n"
    monkeypatch.chdir(tmp_path)
    assert status_of("x", "-o", "a" * 5000 + ".png") == 2
    assert status_of("x", "--checkpoint", "a" * 5000) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("jitjax: error: File name too long: 'aaaa")
        assert len(line) < 200


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def save(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.png'"):
        images.write_png(tmp_path / "a.png", IMAGE, "p", {})
    assert not list(tmp_path.iterdir())

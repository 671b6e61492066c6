"""Names of files on a command line."""

from pathlib import Path

import pytest

from kdjax.names import brief, named_paths, png_name


def test_files_are_named_without_suffix_and_folders_as_they_are() -> None:
    assert named_paths(["a/x.pth", "b/x.pth", "y.v2.pth", "z=c/x.pth", r"C:\a=b"], "--model") == {
        "a_x": "a/x.pth",
        "b_x": "b/x.pth",
        "y.v2": "y.v2.pth",
        "z": "c/x.pth",
        r"C:\a=b": r"C:\a=b",
    }
    assert named_paths([".", "kodak.v2", "embedded"], "--data", folders=True) == {
        Path.cwd().name: ".",
        "kodak.v2": "kodak.v2",
        "embedded": "embedded",
    }


def test_a_path_that_exists_has_no_name_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert named_paths(["lr=1"], "--data", folders=True) == {"lr=1": "lr=1"}


def test_names_are_given_once() -> None:
    with pytest.raises(ValueError, match=r"^y.pth: 'a' is also the name of x.pth; .* --model NAME=y.pth$"):
        named_paths(["a=x.pth", "a=y.pth"], "--model")
    with pytest.raises(ValueError, match=r"^x/input.pth: 'input' already means something else"):
        named_paths(["x/input.pth"], "--model", reserved=("input",))


def test_brief_is_short_and_cheap_whatever_the_value() -> None:
    nested: list = []
    for _ in range(100):  # its repr would have 4^100 brackets
        nested = [nested] * 4
    for value in (nested, {"a": 10**5000}, "x" * 10**6, b"x" * 10**6, list(range(10**6)), "\x1b[2J"):
        assert len(brief(value)) <= 60 and brief(value).isprintable()
    assert brief({"a": [1, 2]}) == "{'a': [1, 2]}" and len(brief("x" * 100, 20)) == 20


def test_every_image_has_a_picture_of_its_own() -> None:
    names = ["1.png", "1.jpg", "a/1.png", "b/1.jpg", "ü" * 125 + ".tif", "x" * 255, "x" * 254 + "y"]
    pictures = [png_name(name) for name in names]
    assert pictures[:4] == ["1.png", "1.jpg.png", "a/1.png", "b/1.jpg.png"] and len(set(pictures)) == len(names)
    assert all(name.endswith(".png") and len(name.encode()) <= 255 for name in pictures)

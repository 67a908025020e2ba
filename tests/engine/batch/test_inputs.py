"""What names a picture, and what each output is called: never outside, never twice."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from flashdip.engine.batch.inputs import Found, Maker, expand, looks
from flashdip.engine.batch.storage import Outputs, checked, safe_name
from flashdip.engine.errors import ConfigError, InputError
from tests.batches import write_bad, write_pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "in", 5)
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / ".hidden.png").write_bytes(b"")
    return tmp_path / "in"


def maker(folder: Path, task: str = "denoise", **more: Any) -> Maker:
    given = {"own": {}, "options": {"preset": "quick"}} | more
    return Maker(task, outputs=Outputs(str(folder.parent / "out")), **given)


def names(found: list[Found]) -> list[str]:
    return [one.name for one in found]


ALL = ["1.png", "2.png", "3.png", "below/0.png", "below/4.png"]


def test_folders_files_and_patterns(folder: Path) -> None:
    outputs = Outputs(str(folder / "out"))
    (folder / "out").mkdir()
    (folder / "out" / "1.png").write_bytes((folder / "1.png").read_bytes())
    assert names(expand([str(folder)], outputs)) == ALL
    assert names(expand([str(folder / "**" / "[0-3].png")], outputs)) == [
        *("1.png", "2.png", "3.png", "below/0.png")
    ]
    assert names(expand([str(folder / "2.png"), f"{folder}/2*"], outputs)) == ["2.png"]
    assert names(expand([f"file://{folder}/2.png"], outputs)) == ["2.png"]
    assert expand([str(folder / "2.png")], outputs)[0].source == str(folder / "2.png")


def test_names_with_brackets_are_files_before_they_are_patterns(folder: Path) -> None:
    odd = folder / "a[1]*.png"
    odd.write_bytes((folder / "1.png").read_bytes())
    assert names(expand([str(odd)], Outputs("/none"))) == ["a[1]*.png"]


@pytest.mark.parametrize("missing", ["nothing.png", "nothing*.png", "empty"])
def test_what_names_nothing_is_refused(folder: Path, missing: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match="got nothing of the kind"):
        expand([str(folder / missing)], Outputs("/none"))


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "b/../../a.png", "", ".", "s3://b/a.png", "a\0.png",
             ".flashdip/a.png"]
)  # fmt: skip
def test_outputs_stay_inside(name: str) -> None:
    with pytest.raises(InputError, match="within the output folder"):
        safe_name(name)


def test_plain_names_stay_as_they_are() -> None:
    assert safe_name("a/b..c/.d.png") == "a/b..c/.d.png"
    assert safe_name("./a.png") == "a.png"


def test_two_jobs_never_share_an_output(folder: Path) -> None:
    found = [Found("/x/a.png", "a.png"), Found("/y/a.png", "a.png")]
    with pytest.raises(InputError, match=r"/x/a.png and /y/a.png"):
        maker(folder).jobs(found)
    found = [Found("/x/a.jpg", "a.jpg"), Found("/x/a.png", "a.png")]
    assert len(maker(folder).jobs(found)) == 2
    with pytest.raises(InputError, match="got one for both"):
        maker(folder, suffix=".png").jobs(found)


def test_an_input_is_never_replaced(folder: Path) -> None:
    own = Maker("denoise", {}, {}, Outputs(str(folder)))
    with pytest.raises(InputError, match="holds no inputs"):
        own.jobs([Found(str(folder / "1.png"), "1.png")])
    # Also not under another name, or through a link.
    with pytest.raises(InputError, match="holds no inputs"):
        own.jobs([Found(str(folder / "2.png"), "1.png"), Found(str(folder / "1.png"), "2.png")])
    (folder.parent / "out").symlink_to(folder)
    with pytest.raises(InputError, match="holds no inputs"):
        maker(folder).jobs([Found(str(folder / "1.png"), "1.png")])


def test_paths_in_no_known_writing_are_refused(folder: Path) -> None:
    odd = os.fsdecode(bytes(folder) + b"/\xff.png")
    Path(odd).write_bytes((folder / "1.png").read_bytes())
    with pytest.raises(InputError, match="expected a path in UTF-8") as caught:
        maker(folder).jobs(expand([str(folder)], Outputs("/none")))
    assert str(caught.value).isprintable()


def test_jobs_know_their_recipe_and_size(folder: Path) -> None:
    found = expand([str(folder)], Outputs("/none"))
    jobs = [job for job, _ in maker(folder, "superres", own={"factor": 3}).jobs(found)]
    assert {id(job.recipe) for job in jobs} == {id(jobs[0].recipe)}
    sizes = {job.name: (job.looks, job.pixels) for job in jobs}
    assert sizes["1.png"] == ((24, 16, 3), 24 * 16 * 9)
    assert jobs[0].recipe.config.iterations == jobs[0].recipe.config.iterations
    assert len({job.group for job in jobs}) == 3


@pytest.mark.parametrize(
    ("task", "own", "options", "words"),
    [
        ("superres", {}, {}, "factor"),
        ("denoise", {"factor": 2}, {}, "denoise takes no such option"),
        ("denoize", {}, {}, "denoize"),
        ("denoise", {}, {"preset": "nothing"}, "nothing"),
        ("denoise", {}, {"iterations": 0}, "iterations"),
        ("denoise", {}, {"settings": {"networks.down": "8"}}, "no such field"),
    ],
)
def test_options_are_checked_before_anything_runs(
    folder: Path, task: str, own: Any, options: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        maker(folder, task, own=own, options=options).jobs([Found("/x/a.png", "a.png")])


def test_masks_and_truths_of_the_same_names(folder: Path) -> None:
    found = [Found(str(folder / "1.png"), "1.png", {"truth": "/t.png"})]
    one = maker(folder, "inpaint", mask=str(folder), truth=str(folder / "2.png"))
    ((job, _),) = one.jobs(found)
    assert (job.mask, job.truth) == (str(folder / "1.png"), "/t.png")
    ((job, _),) = one.jobs([Found(str(folder / "1.png"), "1.png")])
    assert job.truth == str(folder / "2.png")


def test_headers_of_broken_files_say_nothing(folder: Path) -> None:
    for name in write_bad(folder):
        assert looks(str(folder / name)) is None
    assert looks(str(folder / "2.png")) == (32, 32, 3)


@pytest.mark.parametrize(
    "address",
    ["sftp://me:secret@host/a", "https://host/a?token=secret", "https://me:secret@host/a"],
)
def test_addresses_with_credentials_are_refused_without_showing_them(address: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(address)
    assert "secret" not in str(caught.value)


def test_unknown_protocols_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be reached"):
        checked("nothing://bucket/folder")


def manifest(folder: Path, text: str, name: str = "list.csv") -> list[Found]:
    (folder / name).write_text(text, encoding="utf-8-sig")
    return expand([str(folder / name)], Outputs("/none"))


def test_a_manifest_as_csv(folder: Path) -> None:
    text = (
        "image,output,mask,sigma,preset,truth,seed\n"
        "1.png,,,,,,\n"
        '"below/0.png",deep/er.tif,2.png,12.5,quick,/abs/t.png,7\n'
    )
    one, two = manifest(folder, text)
    assert one == Found(str(folder / "1.png"), "1.png", {})
    expected = {"mask": str(folder / "2.png"), "truth": "/abs/t.png"}
    expected |= {"sigma": 12.5, "preset": "quick", "seed": 7}  # type: ignore[dict-item]
    assert two == Found(str(folder / "below" / "0.png"), "deep/er.tif", expected)


def test_a_manifest_as_json_lines(folder: Path) -> None:
    rows = [{"image": "1.png", "sigma": 5, "mask": None}, {"image": "2.png", "iterations": 9}]
    text = "\n\n".join(json.dumps(row) for row in rows)
    found = manifest(folder, text, "list.jsonl")
    assert [one.options for one in found] == [{"sigma": 5.0}, {"iterations": 9}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("image,colour\n1.png,red\n", "line 2: 'colour': no such column"),
        ("image,sigma\n1.png,loud\n", "line 2: sigma: expected a number"),
        ("image,sigma\n1.png,nan\n", "line 2: sigma: expected a number"),
        ("image,seed\n1.png,1.5\n", "line 2: seed: expected a whole number"),
        ("image,output\n1.png,../2.png\n", "line 2: output '../2.png'"),
        ("image,output\n1.png\n", "line 2: expected as many cells"),
        ("image,output\n1.png,a,b\n", "line 2: expected as many cells"),
        ("sigma\n5\n", "line 2: image: expected the path"),
        ("image\nsftp://me:secret@host/a.png\n", "without password"),
        ("image\n", "at least one picture"),
        ('image\n"1.png\n', "line"),
    ],
)
def test_a_wrong_line_is_named(folder: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        manifest(folder, text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [('["1.png"]', "an object"), ("{", "line 1"), ('{"image": 5}', "expected text")],
)
def test_a_wrong_line_of_json_is_named(folder: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        manifest(folder, text, "list.jsonl")

import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from shards.datasets import DATASETS, DatasetSpec
from shards.errors import DataConfigError
from shards.read.subset import read_list
from shards.write.exclusion import (
    check_sizes,
    is_duplicates_list,
    report_exclusion,
    report_leftovers,
)
from shards.write.image_folder import list_images
from shards.write.listing import DomainListing, Listing, report_passed_over
from tests.support.shards_fixtures import (
    FOLDER,
    awkward_folder,
    domain_folders,
    image_bytes,
    make_folder,
)

FIVE = [name for name in DATASETS if name not in ("digits", "folder")]


def assert_equals_imagefolder(listing: Listing, root: Path) -> None:
    for domain in listing.domains:
        reference = ImageFolder(str(root / domain.name))
        assert list(listing.classes) == reference.classes
        ours = [str(root / domain.name / path) for path in domain.paths]
        assert list(zip(ours, domain.labels, strict=True)) == reference.samples


def test_awkward_names_are_listed_as_imagefolder_does(tmp_path: Path) -> None:
    listing = list_images(awkward_folder(tmp_path), FOLDER)
    names = sorted(entry.name for entry in os.scandir(tmp_path) if entry.is_dir())
    assert [domain.name for domain in listing.domains] == names
    assert_equals_imagefolder(listing, tmp_path)


def test_links_and_odd_files_are_listed_as_imagefolder_does(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", per_class=3)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "below").mkdir(parents=True)
    (elsewhere / "below" / "q.PnG").write_bytes(image_bytes(1))
    (elsewhere / "one.ppm").write_bytes(image_bytes(2, "PPM"))
    cat = root / "art" / "cat"
    (cat / "linked folder").symlink_to(elsewhere)
    (cat / "0 linked.jpg").symlink_to(elsewhere / "one.ppm")
    (cat / "one.ppm.txt").symlink_to(elsewhere / "one.ppm")
    (cat / ".hidden.png").write_bytes(image_bytes(3))
    (cat / ".jpg").write_bytes(image_bytes(4, "JPEG"))
    (cat / "folder.jpg").mkdir()
    (cat / "folder.jpg" / "inside.jpeg").write_bytes(image_bytes(5, "JPEG"))
    (cat / "gif.gif").write_bytes(image_bytes(6, "GIF"))
    (root / "photo").rename(tmp_path / "photo")
    (root / "photo").symlink_to(tmp_path / "photo")
    os.rename(cat / "im000.png", os.fsencode(cat) + b"/not utf-8 \xff.png")
    listing = list_images(root, FOLDER)
    assert [domain.name for domain in listing.domains] == ["art", "photo", "sketch"]
    assert len(listing.domains[0].paths) == 2 * 3 + 6
    assert_equals_imagefolder(listing, root)


@pytest.mark.parametrize("name", FIVE)
def test_layouts_of_domainbed(tmp_path: Path, name: str) -> None:
    spec = DATASETS[name]
    assert spec.domains is not None
    assert spec.folder is not None
    root = domain_folders(tmp_path / spec.folder, spec)
    (root / "image_list.txt").write_text("a file beside the domains")
    (tmp_path / "another_dataset").mkdir()
    listing = list_images(root, spec)
    assert tuple(domain.name for domain in listing.domains) == spec.domains
    assert len(listing.classes) == spec.num_classes
    assert_equals_imagefolder(listing, root)
    assert list_images(tmp_path, spec) == listing  # as DomainBed's --data_dir


@pytest.mark.parametrize("name", [name for name in FIVE if name != "domainnet"])
def test_folders_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    spec = DATASETS[name]
    assert spec.domains is not None
    first, last = spec.domains[0], spec.domains[-1]
    root = domain_folders(tmp_path, spec)

    def refused(match: str) -> None:
        with pytest.raises(DataConfigError, match=match):
            list_images(root, spec)

    (root / "annotations").mkdir()
    refused("domain 'annotations' does not belong there; dataset .* has the domains")
    (root / last).rename(root / "Last")
    refused(f"domain '{last}' is missing, 'Last' does not belong there, 'annotations' does not")
    (root / "annotations").rmdir()
    (root / "Last").rename(root / last)
    (root / last / "class 001").rename(root / last / "Class 001")
    refused(
        f"domain '{last}' has the extra class 'Class 001' .in 1 of . domains. and lacks the class "
        f"'class 001' .in . of . domains. compared with domain '{first}'"
    )
    for domain in spec.domains[:-1]:
        (root / domain / "class 001").rename(root / domain / "Class 001")
    list_images(root, spec)
    for domain in spec.domains:
        (root / domain / ".cache").mkdir()
    refused(rf"{(spec.num_classes or 0) + 1} classes found, .* has {spec.num_classes}; found: .cac")
    for domain in spec.domains:
        (root / domain / ".cache").rmdir()
        for path in (root / domain / "class 002").iterdir():
            path.unlink()
        (root / domain / "class 002").rmdir()
    refused(f"{(spec.num_classes or 0) - 1} classes found, dataset {name} has {spec.num_classes}")


def test_what_is_no_dataset_is_refused(tmp_path: Path) -> None:
    def refused(root: Path, match: str, spec: DatasetSpec = FOLDER) -> None:
        with pytest.raises(DataConfigError, match=match):
            list_images(root, spec)

    refused(tmp_path / "none", "--root .*none: no such folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no folder")
    extra = make_folder(tmp_path / "extra")
    (extra / "photo" / "cow").mkdir()
    refused(
        extra, "'photo' has the extra class 'cow' .in 1 of 3 domains. compared with domain 'art'"
    )
    lacking = make_folder(tmp_path / "lacking")
    (lacking / "sketch" / "dog").rename(tmp_path / "dog")
    refused(
        lacking, "'sketch' lacks the class 'dog' .in 2 of 3 domains. compared with domain 'art'"
    )
    hollow = make_folder(tmp_path / "hollow")
    for path in (hollow / "photo" / "dog").iterdir():
        path.rename(path.with_suffix(".txt"))
    refused(hollow, "class 'dog' of domain 'photo' holds no image")
    stray = make_folder(tmp_path / "stray")
    (stray / "zz_annotations").mkdir()
    refused(stray, "domain 'zz_annotations' holds no class folder; move the folder away if it is")


def refusal(root: Path, spec: DatasetSpec = FOLDER) -> str:
    """What is said of a folder that cannot be listed."""
    with pytest.raises(DataConfigError) as caught:
        list_images(root, spec)
    return str(caught.value)


def test_a_root_one_level_too_deep_is_told_from_a_stray_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "my images")
    too_deep = refusal(root / "photo")
    assert "domain 'cat' holds images but no class folder; --root seems to be one le" in too_deep
    assert too_deep.endswith(f"give its parent folder, --root '{root}'")
    monkeypatch.chdir(root / "photo")
    assert refusal(Path()).endswith(f"give its parent folder, --root '{root}'")
    for stray in ("aa_loose", "zz_loose"):
        shutil.copytree(root / "art" / "cat", root / stray)
        told = refusal(root)
        assert f"domain {stray!r} holds images but no class folder; sort them into class " in told
        shutil.rmtree(root / stray)


def test_hidden_folders_are_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")

    def told_of(path: str) -> str:
        (root / path).mkdir()
        told = refusal(root)
        (root / path).rmdir()
        return told

    assert told_of(".cache").endswith(
        "'.cache' holds no class folder; '.cache' is a hidden folder: move it away or delete it"
    )
    (root / ".cache" / "hub").mkdir(parents=True)
    assert refusal(root).endswith("; '.cache' is a hidden folder: move it away or delete it")
    shutil.rmtree(root / ".cache")
    for path in ("art/.ipynb_checkpoints", "photo/.ipynb_checkpoints"):
        told = told_of(path)
        assert (
            "class '.ipynb_checkpoints' (in 1 of 3 domains) compared with domain 'art'; all d"
            in told
        )
        assert told.endswith(f"; {path!r} is a hidden folder: move it away or delete it")
    for domain in ("photo", "sketch"):
        (root / domain / ".cache").mkdir()
    told = told_of("art/.cache")
    assert "class '.cache' of domain 'art' holds no image" in told
    assert told.endswith("; 'art/.cache' is a hidden folder: move it away or delete it")
    pacs = domain_folders(tmp_path / "PACS", DATASETS["pacs"])
    (pacs / ".cache").mkdir()
    assert "; '.cache' is a hidden folder: move it away" in refusal(pacs, DATASETS["pacs"])


def test_a_hidden_folder_with_images_is_not_to_be_deleted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images")
    shutil.copytree(root / "art" / "cat", root / "sketch" / ".thumbnails")
    assert refusal(root).endswith("; 'sketch/.thumbnails' is a hidden folder: move it away")


def command_in(text: str) -> str:
    """The command in backquotes that a message gives."""
    _, command, _ = text.split("`")
    return command


def test_a_class_renamed_in_most_domains_is_told_with_its_old_name(tmp_path: Path) -> None:
    root = make_folder(tmp_path, domains=("a", "b", "c", "d"))
    for domain in "bcd":
        (root / domain / "dog").rename(root / domain / "hound")
    assert (
        "domain 'b' has the extra class 'hound' (in 3 of 4 domains) and lacks the class 'dog' "
        "(in 1 of 4 domains) compared with domain 'a'; all domains need the same" in refusal(root)
    )


@pytest.mark.parametrize("kind", ["class", "domain"])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xe9toile", "étoile"),
        (b"new\nline", "new_line"),
        (b"it's \x07", "it's _"),
        (b"\xff", "ÿ"),
    ],
)
def test_names_that_are_no_text_are_refused_and_the_command_mends_them(
    tmp_path: Path, kind: str, old: bytes, new: str
) -> None:
    root = make_folder(tmp_path / "my images", per_class=1)
    top = os.fsencode(root)
    folders = ["art/cat", "photo/cat", "sketch/cat"] if kind == "class" else ["photo"]
    for folder in folders:
        whole = os.path.join(top, folder.encode())
        os.rename(whole, os.path.join(os.path.dirname(whole), old))
    told = refusal(root)
    assert f"{os.fsdecode(old)!r} cannot be the name of a {kind}: it has line breaks" in told
    told.encode()
    subprocess.run(["bash", "-c", command_in(told)], check=True)
    listing = list_images(root, FOLDER)
    names = listing.classes if kind == "class" else [domain.name for domain in listing.domains]
    assert new in names


@pytest.mark.parametrize("path", ["__MACOSX/art/cat", "@eaDir/x", "art/@eaDir"])
def test_folders_that_others_leave_are_told_and_the_command_removes_them(
    tmp_path: Path, path: str
) -> None:
    root = make_folder(tmp_path / "my images")
    (root / path).mkdir(parents=True)
    told = refusal(root)
    assert re.search(
        "'(__MACOSX|@eaDir)' is left by .* no (class|domain); move it away, or d", told
    )
    subprocess.run(["bash", "-c", command_in(told)], check=True)
    assert len(list_images(root, FOLDER).domains) == 3


def test_files_that_macos_leaves_are_told_and_the_command_removes_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "my images")
    before = list_images(root, FOLDER)
    report_leftovers(before)
    assert caplog.text == ""
    for path in sorted(root.glob("*/*/*")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X        ")
    report_leftovers(list_images(root, FOLDER))
    assert caplog.messages[0].startswith("57 of the images were written by macOS beside others an")
    subprocess.run(["bash", "-c", command_in(caplog.messages[0])], check=True)
    assert list_images(root, FOLDER) == before
    (root / "art/cat/._x.png").write_bytes(image_bytes(1))
    (root / "art/cat/._y.png").write_bytes(b"\0\5\26\7")
    report_leftovers(list_images(root, FOLDER))
    assert caplog.messages[1].startswith("1 of the images were")
    assert "delete" not in caplog.messages[1], "one of such a name is an image"


def test_a_folder_that_cannot_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here by the system's answer, since permissions do not stop the administrator."""
    root = make_folder(tmp_path / "images")
    below = root / "art" / "dog" / "below"
    below.mkdir()
    (below / "lost.png").write_bytes(image_bytes(1))
    real = os.scandir

    def scandir(path: str) -> object:
        if os.fspath(path) == str(below):
            raise PermissionError(13, "Permission denied", str(below))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        DataConfigError, match=rf"{below}: cannot be listed \(Permission denied\); check its perm"
    ):
        list_images(root, FOLDER)


def test_files_that_are_no_images_by_their_names_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_folder(tmp_path / "images")
    report_passed_over(list_images(root, FOLDER))
    (root / "art" / "cat" / "notes.TXT").write_text("not an image")
    (root / "art" / "cat" / ".DS_Store").write_text("not an image")
    with caplog.at_level(logging.INFO):
        report_passed_over(list_images(root, FOLDER))
        for domain in ("art", "photo"):
            (root / domain / "dog" / "moving.gif").write_bytes(image_bytes(1, "GIF"))
        listing = list_images(root, FOLDER)
        report_passed_over(listing)
    assert listing.passed_over == {".gif": 2, ".txt": 1, "": 1}
    begin = "not images by their names, passed over: "
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", begin + "1 without ending, 1 .txt"),
        ("WARNING", begin + "2 .gif, 1 without ending, 1 .txt"),
    ]


def test_exclusion_comes_before_places(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_folder(tmp_path / "images")
    text = "art/cat/im000.png\n\n./photo/dog/im003.jpg\r\nart/cat/im000.png\nno/such.png\n"
    (tmp_path / "list.txt").write_bytes(text.encode())
    exclude = read_list("--exclude_list", tmp_path / "list.txt")
    with caplog.at_level(logging.INFO):
        listing = list_images(root, FOLDER, exclude)
        report_exclusion(listing, exclude)
    assert (listing.excluded, listing.unmatched) == (2, ("no/such.png",))
    assert "2 images left out" in caplog.text
    assert "1 of 3 entries name no image (no/such.png)" in caplog.text
    (root / "art/cat/im000.png").unlink()
    (root / "photo/dog/im003.jpg").unlink()
    assert_equals_imagefolder(listing, root)
    assert list_images(root, FOLDER).domains == listing.domains
    caplog.clear()
    report_exclusion(list_images(root, FOLDER), [])
    assert caplog.text == ""


def test_lists_name_any_file(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "images", domains=("art",))
    folder = os.fsencode(root / "art" / "cat")
    odd = [b"latin\xe9.png", "line\u2028break\x85.png".encode(), b"quote'\".png", b"two  .png"]
    for name in odd:
        with open(os.path.join(folder, name), "wb") as stream:
            stream.write(image_bytes(1))
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(b"art/cat/" + name + b"\r\n" for name in odd))
    listing = list_images(root, FOLDER, read_list("--exclude_list", path))
    assert (listing.excluded, listing.unmatched) == (4, ())
    path.write_bytes("art/cat/im000.png\n".encode("utf-16"))
    with pytest.raises(DataConfigError, match=r"--exclude_list: cannot be read \(not plain text\)"):
        read_list("--exclude_list", path)


def duplicates() -> list[str]:
    """As many entries of every domain as DomainNet's list of duplicates has."""
    spec = DATASETS["domainnet"]
    assert spec.duplicates is not None
    assert spec.domains is not None
    assert sum(spec.duplicates) == 9431
    return [
        f"{domain}/class 000/dup{number}.jpg"
        for domain, count in zip(spec.domains, spec.duplicates, strict=True)
        for number in range(count)
    ]


def sized(sizes: tuple[int, ...]) -> Listing:
    """A listing of DomainNet with some number of images per domain."""
    names = DATASETS["domainnet"].domains
    assert names is not None
    domains = tuple(
        DomainListing(name=name, paths=("x",) * size, labels=(0,) * size)
        for name, size in zip(names, sizes, strict=True)
    )
    return Listing(
        root=Path("r"), domains=domains, classes=("c",), excluded=0, unmatched=(), passed_over={}
    )


def test_documented_sizes(caplog: pytest.LogCaptureFixture) -> None:
    spec = DATASETS["domainnet"]
    assert spec.samples is not None
    assert sum(spec.samples) == 586575
    whole = duplicates()
    assert is_duplicates_list(spec, whole)
    assert is_duplicates_list(spec, whole[::-1] + whole[:5])
    assert not is_duplicates_list(spec, whole[1:])
    assert not is_duplicates_list(DATASETS["pacs"], [])
    with caplog.at_level(logging.INFO):
        check_sizes(sized(spec.samples), spec, whole)
        assert "586575, as documented for domainnet" in caplog.text
        check_sizes(sized(spec.samples), spec, [])
        assert not [line for line in caplog.records if line.levelno > logging.INFO]
        short = (48129, 51605, 72265, 172500, 172947, 69129)
        with pytest.raises(
            DataConfigError, match="painting 72265 instead of 72266, sketch 69129 instead of 69128;"
        ):
            check_sizes(sized(short), spec, whole)
        check_sizes(sized(short), spec, whole[1:])
        assert "painting 72265 instead of 72266" in caplog.text
        assert "; give its list of duplicates as --exclude_list" in caplog.text
        caplog.clear()
        check_sizes(sized(short), DATASETS["folder"], whole)
        assert caplog.text == ""

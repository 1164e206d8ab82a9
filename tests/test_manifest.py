"""The manifest: what it must list, and one clear line for each way of getting it wrong."""

import os
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from cryobench import paths
from cryobench.errors import CryobenchError
from cryobench.specimens.manifest import Entry, find_entry, load_manifest

SHA = "0123456789abcdef" * 4
GOOD = f"""\
licences:
  emdb: {{name: none stated, confirmed: false, note: audit}}
entries:
  - id: EMD-1234
    kind: map
    title: "A map"
    used_by: [zhang2024]
    licence: emdb
    files:
      - {{url: "https://example.org/a.map.gz", path: EMD-1234/a.map.gz, size: 12, sha256: {SHA}, of: served}}
    facts:
      - {{fact: symmetry, value: C4, source: a page, status: unconfirmed}}
"""


def written(tmp_path: Path, text: str) -> dict[str, Entry]:
    path = tmp_path / "manifest.yml"
    path.write_text(text)
    return load_manifest(path)


def test_the_papers_entries_are_all_there() -> None:
    used: dict[str, set[str]] = {}
    for entry in load_manifest().values():
        for paper in entry.used_by:
            used.setdefault(paper, set()).add(entry.id)
    assert used == {
        "zhang2024": {"EMD-8511", "EMD-24928", "EMPIAR-10081", "PDB-5U6O"},
        "tang2022": {"EMD-0406", "EMD-23579", "EMPIAR-10153", "EMPIAR-10059"},
        "palovcak2020": {"EMPIAR-10025"},
        "wu2026": {"EMPIAR-10081", "EMPIAR-10289", "EMPIAR-10291"},
    }
    assert "EMPIAR-10146" in load_manifest()


def test_addresses_and_paths_belong_to_their_entry() -> None:
    for entry in load_manifest().values():
        archive, number = entry.id.split("-")
        for file in entry.files:
            for url in (file.url, *file.mirrors):
                assert urlsplit(url).scheme == "https"
                assert number.lower() in urlsplit(url).path.lower()
                assert Path(urlsplit(url).path).name == Path(file.path).name
            assert file.path.startswith(f"{entry.id}/")
            assert archive == "EMPIAR" or len({urlsplit(u).netloc for u in (file.url, *file.mirrors)}) == 2
        assert (archive == "EMPIAR") == (entry.directory is not None)


def test_checksums_are_those_in_the_notes(shared: Path) -> None:
    notes = (shared / "data" / "ARCHIVES.md").read_text()
    for name in ("EMD-8511", "EMD-6287"):
        (file,) = load_manifest()[name].files
        assert f"`{file.sha256}`" in notes
        assert file.url.startswith("https://ftp.ebi.ac.uk/")  # the site whose file the checksum is of


def test_licences_say_what_was_confirmed() -> None:
    entries = load_manifest()
    assert entries["EMPIAR-10081"].licence.name == "CC0"
    assert entries["EMPIAR-10081"].licence.confirmed
    assert not entries["EMD-8511"].licence.confirmed
    assert [fact.fact for fact in entries["EMD-23579"].unconfirmed] == ["identity"]


@pytest.mark.parametrize("name", ["EMD-8511", "emd-8511", "8511", "EMD_8511", "emdb-8511", " Emd 8511 "])
def test_names_of_a_map(name: str) -> None:
    assert find_entry(name).id == "EMD-8511"


def test_names_of_other_archives() -> None:
    assert find_entry("empiar-10081").id == find_entry("10081").id == "EMPIAR-10081"
    assert find_entry("5u6o").id == find_entry("PDB 5U6O").id == "PDB-5U6O"
    with pytest.raises(CryobenchError, match=r"did you mean .*EMD-8511"):
        find_entry("EMD-8510")


def test_good_manifest_and_defaults(tmp_path: Path) -> None:
    entry = written(tmp_path, GOOD.replace(f", size: 12, sha256: {SHA}, of: served", ""))["EMD-1234"]
    (file,) = entry.files
    assert (file.size, file.sha256, file.of, file.mirrors) == (None, None, "served", ())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("size: 12", "size: twelve", r"EMD-1234: a file: size is 'twelve'"),
        ("size: 12", "size: true", r"EMD-1234: a file: size is 'True'"),
        ("size: 12", "szie: 12", r"unknown field 'szie'"),
        (SHA, "abc", r"sha256 is 'abc', but has to be 64"),
        ("of: served", "of: gz", r"of is 'gz', but has to be one of served, unpacked"),
        ("https://example.org", "ftp://example.org", r"url is 'ftp://"),
        ("path: EMD-1234", "path: ../EMD-1234", r"leaves the data folder"),
        ("path: EMD-1234", "path: /EMD-1234", r"leaves the data folder"),
        ("licence: emdb", "licence: mit", r"licence 'mit' is not among emdb"),
        ("kind: map", "kind: film", r"kind is 'film'"),
        ('    title: "A map"\n', "", r"EMD-1234: title is missing"),
        ("id: EMD-1234", "id: 1234", r"id is '1234', but has to be EMD-"),
        ("status: unconfirmed", "status: maybe", r"a fact: status is 'maybe'"),
        ("entries:", "entries: [", r"not readable as YAML"),
        ("entries:", "items:", r"unknown field 'items'"),
    ],
)
def test_one_clear_line_for_each_mistake(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(CryobenchError, match=message) as caught:
        written(tmp_path, GOOD.replace(old, new, 1))
    assert "\n" not in str(caught.value)


def test_doubles_are_refused(tmp_path: Path) -> None:
    entry = GOOD.split("entries:\n")[1]
    with pytest.raises(CryobenchError, match="listed twice"):
        written(tmp_path, GOOD + entry)
    with pytest.raises(CryobenchError, match="also belongs to EMD-1234"):
        written(tmp_path, GOOD + entry.replace("id: EMD-1234", "id: EMD-5678"))


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(CryobenchError, match="no manifest there"):
        load_manifest(tmp_path / "none.yml")
    with pytest.raises(CryobenchError, match="has to be a table"):
        written(tmp_path, "")


def test_a_changed_manifest_is_read_again(tmp_path: Path) -> None:
    assert written(tmp_path, GOOD)["EMD-1234"].title == "A map"
    os.utime(tmp_path / "manifest.yml", ns=(1, 1))  # two writes may fall within one tick of the clock
    load_manifest(tmp_path / "manifest.yml")
    assert written(tmp_path, GOOD.replace("A map", "Another"))["EMD-1234"].title == "Another"


def test_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRYOBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CRYOBENCH_DATA", raising=False)
    assert paths.data_dir() == tmp_path / "cache" / "data"
    monkeypatch.setenv("CRYOBENCH_DATA", str(tmp_path / "elsewhere"))
    assert paths.data_dir() == tmp_path / "elsewhere"
    assert list(tmp_path.iterdir()) == []  # asking creates nothing
    assert (paths.project_root() / "data" / "manifest.yml").is_file()


def test_installed_beside_pytables_is_not_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "cryobench"
    (package.parent / "tables").mkdir(parents=True)  # the PyTables package
    monkeypatch.setattr(paths, "__file__", str(package / "paths.py"))
    assert paths.project_root() == package / "_share"

"""Headers say what must be there, or are refused by the name of the file and the key."""

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from upweight.errors import StaleStore
from upweight.runtime.headers import own_digest, read_json, read_toml, write_json


class Kind(enum.Enum):
    ONE = "the first"
    TWO = "the second"


@dataclass(frozen=True)
class Inner:
    notes: tuple[str, ...] = ()
    health: Mapping[str, Any] = ()


@dataclass(frozen=True)
class Header:
    n: int
    error: float
    kind: Kind
    sizes: Mapping[str, int]
    inner: Inner
    columns: tuple[str, ...] | None


GOOD = {
    "n": 3,
    "error": 1,
    "kind": "TWO",
    "sizes": {"a": 1},
    "inner": {"notes": ["é", "\ud83d"]},
    "columns": None,
}


def read(path):
    return read_json(path, 2, Header, "delete it.")


def test_what_was_written_is_read(tmp_path):
    write_json(tmp_path / "h.json", 2, GOOD)
    header = Header(3, 1.0, Kind.TWO, {"a": 1}, Inner(("é", "\ud83d")), None)
    assert read(tmp_path / "h.json") == header


@given(st.dictionaries(st.text(), st.floats() | st.integers() | st.text() | st.none()))
def test_any_json_survives(tmp_path_factory, fields):
    path = tmp_path_factory.mktemp("headers") / "h.json"
    fields = {k: v for k, v in fields.items() if k not in ("schema", "digest")}
    write_json(path, 1, fields)
    assert repr(read_json(path, 1, dict[str, Any], "")) == repr(fields)


CHANGES = {
    "`schema`": [{"schema": 1}, {"schema": None}, {"schema": [2]}],
    "`n`": [{"n": "3"}, {"n": 3.0}, {"n": True}, {"n": None}, {"n": 10**400}, {"n": [3]}],
    "`error`": [{"error": "1"}, {"error": float("nan")}, {"error": float("inf")}],
    "`kind`": [{"kind": "THREE"}, {"kind": 1}, {"kind": ["ONE"]}],
    "`sizes": [{"sizes": []}, {"sizes": {"a": "1"}}, {"sizes": None}],
    "`inner": [{"inner": None}, {"inner": {"notes": "a"}}, {"inner": {"other": 1}}],
    "`columns": [{"columns": "abc"}, {"columns": [1]}, {"columns": {}}],
    "`more`": [{"more": 1}],
    "`digest`": [{"n": 4}, {"digest": "0"}, {"digest": None}],
}


@pytest.mark.parametrize(
    "key, change", [(key, change) for key, changes in CHANGES.items() for change in changes]
)
def test_another_value_is_refused_by_its_key(tmp_path, key, change):
    path = tmp_path / "h.json"
    write_json(path, 2, GOOD)
    fields = json.loads(path.read_text()) | change
    if key != "`digest`":  # whoever edits it may know how the hash is made
        rest = {k: v for k, v in fields.items() if k != "digest"}
        fields["digest"] = own_digest(rest)
    path.write_text(json.dumps(fields))
    with pytest.raises(StaleStore, match=rf"(?s)^{key}.*h\.json.*delete it\.$"):
        read(path)


@pytest.mark.parametrize("key", sorted(GOOD))
def test_a_missing_key_is_named(tmp_path, key):
    write_json(tmp_path / "h.json", 2, {k: v for k, v in GOOD.items() if k != key})
    with pytest.raises(StaleStore, match=f"`{key}` in h.json must be there"):
        read(tmp_path / "h.json")


DAMAGE = {
    "empty": b"",
    "binary": bytes(range(256)),
    "zeros": b"\0" * 100,
    "another value": b"3",
    "a list": b"[]",
    "a text": b'"schema"',
    "null": b"null",
    "nothing in it": b"{}",
    "nested": b"[" * 100_000,
    "nested tables": b'{"a":' * 100_000,
    "a mark before it": b"\xef\xbb\xbf{}",
    "two bytes a character": '{"schema": 2}'.encode("utf-16"),
    "a long number": b'{"schema": ' + b"9" * 10_000 + b"}",
    "a key twice": b'{"schema": 2, "schema": 2}',
    "pickle": b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}.",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("reader", [read_json, read_toml])
def test_damaged_files_are_refused_by_name(tmp_path, damage, reader):
    path = tmp_path / "h.json"
    path.write_bytes(DAMAGE[damage])
    with pytest.raises(StaleStore, match=r"(?s)h\.json.*delete it\.$"):
        reader(path, 2, Header, "delete it.")


@pytest.mark.parametrize("length", range(0, 230, 19))
def test_a_file_that_was_cut_is_refused(tmp_path, length):
    path = tmp_path / "h.json"
    write_json(path, 2, GOOD)
    whole = path.read_bytes()
    assert len(whole) >= 230
    path.write_bytes(whole[:length])
    with pytest.raises(StaleStore, match=r"h\.json"):
        read(path)


def test_a_folder_in_its_place_is_refused_and_nothing_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "h.json")
    (tmp_path / "h.json").mkdir()
    with pytest.raises(StaleStore, match=r"h\.json"):
        read(tmp_path / "h.json")


def test_a_user_may_edit_toml_on_any_system(tmp_path):
    path = tmp_path / "run.toml"
    told = 'schema = 2\nn = 3\nerror = 1\nkind = "ONE"\n[sizes]\n[inner]\n'
    path.write_bytes(b"\xef\xbb\xbf" + told.replace("\n", "\r\n").encode())
    with pytest.raises(StaleStore, match=r"`columns` in run\.toml must be there"):
        read_toml(path, 2, Header, "")
    path.write_text(told.replace("[sizes]", "columns = []\n[sizes]"))
    assert read_toml(path, 2, Header, "").kind is Kind.ONE

"""JSON files on disks that fill up, by processes that are killed."""

from __future__ import annotations

import json
import os
import resource
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from cdmoe_plugin.atomic import read_json, write_json
from tests.helpers.killing import KILLED, dying_before, run

OLD, NEW = {"a": [1, 2]}, {"a": list(range(1000))}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "[1] state.json"
    write_json(path, OLD)
    return path


def test_killed_at_every_moment(path: Path) -> None:
    seen = []
    for moment in count():
        write_json(path, OLD)
        assert [file.name for file in path.parent.iterdir()] == [path.name]  # nothing that a killed process left
        moments = frozenset({"open", "os.rename", "os.remove"})
        status = run(dying_before(moment, partial(write_json, path, NEW), moments))
        seen.append(read_json(path))
        if status == 0:
            break
        assert status == KILLED
    assert len(seen) > 3
    assert seen == sorted(seen, key=[OLD, NEW].index)


def test_what_a_running_process_writes_is_not_taken_for_a_leftover(path: Path) -> None:
    written = partial(write_json, path.parent / "other.json", NEW)
    run(dying_before(0, written, frozenset({"os.rename"})))
    (leftover,) = path.parent.glob(".other.json.*")
    running = leftover.rename(leftover.with_name(f"{leftover.name.rpartition('-')[0]}-{os.getppid()}"))
    elsewhere = path.parent / ".other.json.writing-elsewhere-99999999"
    elsewhere.write_text("")
    written()
    assert set(path.parent.iterdir()) == {path, path.parent / "other.json", running, elsewhere}


def test_a_full_disk(path: Path) -> None:
    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        with pytest.raises(OSError, match=r"too large: could not be written and is unchanged: .*state\.json"):
            write_json(path, NEW)

    assert run(write) == 0
    assert read_json(path) == OLD
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "text", ["", "{", "NaN", '{"a": Infinity}', "[" * 100_000, "1" * 5000, "\ufeff{}", '{"a": 1,}']
)
def test_what_is_no_json_is_refused(text: str, path: Path) -> None:
    path.write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011  (the messages are mostly Python's own)
        read_json(path)
    path.write_bytes(json.dumps(OLD).encode("utf-16"))
    with pytest.raises(ValueError, match="utf-8"):
        read_json(path)

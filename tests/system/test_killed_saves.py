"""A process that is killed while it saves leaves the old checkpoint or the new one, and everything else as it was."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from typing import Any

import pytest
from torch import distributed
from transformers import AutoModelForCausalLM

from cdmoe_plugin import apply_plan
from cdmoe_plugin import atomic as saving_cdmoe
from cdmoe_plugin.atomic import replacing_files
from tests.helpers.killing import KILLED, dying_before, end, run, run_and_kill, start
from tests.helpers.plans import some_plan
from tests.helpers.states import differing, state
from tests.helpers.tiny_models import tiny_model

OTHERS = {"tokenizer.json": "{}", "logs/run/events.1": "...", "empty.txt": "", "model.safetensors.old": "old"}
Content = dict[str, bytes]


class Saves:
    """Two checkpoints that are saved to one folder, where somebody keeps other files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.models = {}
        self.contents: dict[str, Content] = {}
        sizes = {"small": {"vocab": 64}, "large": {"vocab": 600}}
        for name, size in sizes.items():
            self.models[name] = apply_plan(tiny_model("qwen2_moe", **size), some_plan([1, 3]))
            self.save(name)
            self.contents[name] = found(folder)
        for name, text in OTHERS.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        (folder / "link").symlink_to("elsewhere")
        assert set(self.contents["large"]) - set(self.contents["small"])  # shards that must not stay

    def save(self, name: str) -> None:
        self.models[name].save_pretrained(self.folder, max_shard_size="60KB")

    def which(self) -> str | None:
        """The checkpoint that the folder holds bit by bit, if any; nothing else may have changed."""
        content = found(self.folder)
        assert {name: content.pop(name).decode() for name in OTHERS} == OTHERS
        assert os.readlink(self.folder / "link") == "elsewhere"
        return next((name for name, known in self.contents.items() if known == content), None)

    def remove_left_over(self) -> None:
        """As the next save does, but at once."""
        for path in self.folder.parent.glob("*.saving-*"):
            shutil.rmtree(path)

    def nothing_left_over(self) -> bool:
        return ".saving-" not in str([*self.folder.parent.iterdir(), *self.folder.rglob("*")])


def found(folder: Path) -> Content:
    paths = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if ".saving-" not in name}


@pytest.fixture
def saves(tmp_path: Path) -> Saves:
    return Saves(tmp_path / "place" / "checkpoint")


def test_at_every_moment(saves: Saves) -> None:
    seen = []
    for moment in count():
        if saves.which() == "large":
            saves.remove_left_over()
        else:
            saves.save("large")
            assert saves.nothing_left_over()
        status = run(dying_before(moment, lambda: saves.save("small")))
        seen.append(saves.which())
        if status == 0:
            break
        assert status == KILLED
    change = seen.index("small")
    assert change > 10  # before it, all is written and linked; after it, the old is removed
    assert len(seen) > change + 10
    assert set(seen[:change]) == {"large"}
    assert set(seen[change:]) == {"small"}


def test_at_every_moment_in_a_folder_that_must_stay(saves: Saves) -> None:
    """It is a working directory, so files are moved one by one: then there is the old, the new, or no config.json."""

    def save_here() -> None:
        os.chdir(saves.folder)
        saves.models["small"].save_pretrained(".", max_shard_size="60KB")

    seen = []
    for moment in count():
        saves.save("large")
        assert saves.nothing_left_over()
        status = run(dying_before(moment, save_here, frozenset({"os.rename"})))
        seen.append(saves.which())
        if seen[-1] is None:
            with pytest.raises((OSError, ValueError), match=r"config\.json"):
                AutoModelForCausalLM.from_pretrained(saves.folder)
        if status == 0:
            break
        assert status == KILLED
    assert list(dict.fromkeys(seen)) == ["large", None, "small"]


def test_an_error_between_two_moves(saves: Saves, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where files are moved one by one, an error or Ctrl-C takes all of that back."""
    replace = Path.replace
    left = 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == -1:
            raise errors[moment % 2]
        return replace(self, target)

    errors = (OSError("broken"), KeyboardInterrupt("broken"))
    monkeypatch.chdir(saves.folder)
    monkeypatch.setattr(Path, "replace", failing)
    for moment in count():
        left = moment
        try:
            saves.save("small")
            break
        except (OSError, KeyboardInterrupt):
            assert saves.which() == "large"
            assert saves.nothing_left_over()
    assert moment > 10
    assert saves.which() == "small"


def test_at_random_moments(saves: Saves) -> None:
    def save_again_and_again() -> None:
        for name in cycle(["small", "large"]):
            saves.save(name)

    rng, seen = random.Random(0), set()
    for _ in range(15):
        assert run_and_kill(save_again_and_again, after=rng.uniform(0.02, 0.12)) == KILLED
        seen.add(saves.which())
    assert seen <= set(saves.models)
    last = saves.which()
    assert last is not None
    assert differing(state(AutoModelForCausalLM.from_pretrained(saves.folder)), state(saves.models[last])) == []
    saves.save(last)
    assert saves.nothing_left_over()


def test_a_first_save(saves: Saves) -> None:
    saves.folder = saves.folder.parent / "new"
    for moment in count():
        status = run(dying_before(moment, lambda: saves.save("small")))
        assert not saves.folder.exists() or found(saves.folder) == saves.contents["small"]
        if status == 0:
            break
        assert status == KILLED
    assert moment > 3
    assert saves.nothing_left_over()


def test_several_processes_save_to_one_folder(saves: Saves) -> None:
    """Nobody takes the unfinished folder of a process that runs for a leftover."""

    def save_again_and_again() -> None:
        for _ in range(8):
            saves.save("small")

    assert [end(process) for process in [start(save_again_and_again) for _ in range(3)]] == [0, 0, 0]
    assert saves.which() == "small"
    assert saves.nothing_left_over()


def test_with_torch_distributed(saves: Saves, tmp_path: Path) -> None:
    """Every process calls `save_pretrained`, and transformers lets the first one write."""

    def save_in(rank: int) -> Callable[[], None]:
        def save() -> None:
            distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", world_size=2, rank=rank)
            for turn in range(2):
                distributed.barrier()
                if rank == turn:
                    saves.save("small")
            distributed.barrier()

        return save

    assert [end(process) for process in [start(save_in(rank)) for rank in range(2)]] == [0, 0]
    assert saves.which() == "small"


# --- what a save takes over ---


def test_other_files_stay_the_same_ones(saves: Saves) -> None:
    """Whoever has one open goes on writing to it; rights and links stay too."""
    (saves.folder / "logs").chmod(0o750)
    (saves.folder / "script.sh").write_text("#!")
    (saves.folder / "script.sh").chmod(0o711)
    saves.folder.chmod(0o2775)
    before = saves.folder.stat()
    with open(saves.folder / "logs/run/events.1", "a") as log:
        saves.save("small")
        log.write("more")
    assert (saves.folder / "logs/run/events.1").read_text() == "...more"
    assert (saves.folder / "logs").stat().st_mode & 0o7777 == 0o750
    assert (saves.folder / "script.sh").stat().st_mode & 0o7777 == 0o711
    after = saves.folder.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert after.st_ino != before.st_ino


def test_what_others_write_meanwhile_is_kept(saves: Saves, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each process of a `Trainer` writes its random state to the checkpoint's folder."""
    for folder in (saves.folder, saves.folder.parent / "new"):
        with replacing_files(folder) as staging:
            (folder / "sub").mkdir(parents=True)
            (folder / "sub" / "rng_state_1.pth").write_text("1")
            (staging / "file").write_text("2")
        assert (folder / "sub" / "rng_state_1.pth").read_text() == "1"
        assert (folder / "file").read_text() == "2"

    def link_missing(*args: Any) -> None:
        link(*args)
        if not (saves.folder / "late").exists():
            (saves.folder / "late").write_text("3")  # at the last moment before the exchange

    link = saving_cdmoe._link_missing
    monkeypatch.setattr(saving_cdmoe, "_link_missing", link_missing)
    saves.save("small")
    assert (saves.folder / "late").read_text() == "3"


def test_a_folder_by_the_name_of_a_file(saves: Saves) -> None:
    (saves.folder / "generation_config.json").unlink()
    (saves.folder / "generation_config.json").mkdir()
    (saves.folder / "generation_config.json" / "mine").write_text("mine")
    before = found(saves.folder)
    with pytest.raises(ValueError, match="holds a folder generation_config"):
        saves.save("small")
    assert found(saves.folder) == before


def test_a_checkpoint_as_part_of_a_larger_whole(saves: Saves, tmp_path: Path) -> None:
    def save_both() -> None:
        with replacing_files(tmp_path / "whole") as whole:
            saves.models["small"].save_pretrained(whole, max_shard_size="60KB")
            (whole / "vocab").mkdir()
            (whole / "vocab" / "tokenizer.json").write_text("{}")
            assert not (tmp_path / "whole").exists()

    for moment in count():
        # Killed after the folder got its place, it left the whole, too.
        if run(dying_before(moment, save_both)) == 0 or (tmp_path / "whole").exists():
            break
    assert moment > 3
    assert found(tmp_path / "whole") == {**saves.contents["small"], "vocab/tokenizer.json": b"{}"}
    assert {path.name for path in tmp_path.iterdir()} == {"place", "whole"}


def test_where_there_is_no_folder_to_work_in(saves: Saves, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    saves.save("small")
    assert saves.which() == "small"
    saves.folder = saves.folder.parent / "new"
    saves.save("small")
    assert found(saves.folder) == saves.contents["small"]

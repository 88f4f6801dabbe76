"""The folder that a run works in: whose it is, who may write there, and what becomes of it."""

import os
import signal
import socket

import pytest

from bpdq_quantizer.errors import InputError
from bpdq_quantizer.run.run_folder import begin, run_folder
from bpdq_quantizer.storage.files import write_json


def keep(folder):
    """Let a folder hold something to go on from."""
    write_json(folder.resume / "schemes.json", {})


class Stop(Exception):  # noqa: N818, stands for a crash
    pass


def go_on(output, run=None, files=()):
    """Resume a run, and let it end."""
    with run_folder(output, None, True) as folder:
        begin(folder, run or {"bits": 2}, files)


def crash(output, run=None, offload=None, worth=True):
    """A run that crashes, by default when there is something to go on from."""
    with run_folder(output, offload, False) as folder:
        begin(folder, run or {"bits": 2}, [])
        if worth:
            keep(folder)
        raise Stop


def stopped(output, run=None):
    """Leave a folder that is worth keeping."""
    with pytest.raises(Stop):
        crash(output, run)


def refused(output, message, resume=False):
    """The error of a run that may not start."""
    with pytest.raises(InputError, match=message) as error, run_folder(output, None, resume):
        pytest.fail("a run has started")
    return str(error.value)


def test_a_second_run_is_refused_at_once_and_the_first_is_named(tmp_path):
    with run_folder(tmp_path / "out", None, False) as folder:
        before = sorted(folder.path.rglob("*"))
        for resume in (False, True):
            holder = f"process {os.getpid()} on {socket.gethostname()}, started 20"
            line = refused(tmp_path / "out", "another run", resume)
            assert line.startswith(f"{tmp_path}/out.partial is being written by another run: {holder}")
        assert sorted(folder.path.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_killed_run_holds_no_lock(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with run_folder(tmp_path / "out", None, False):
            os.write(writer, b"locked")
            signal.pause()
    assert os.read(reader, 6) == b"locked"
    refused(tmp_path / "out", f"process {child} on ")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with run_folder(tmp_path / "out", None, False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_with_other_outputs_do_not_wait_for_each_other(tmp_path):
    with run_folder(tmp_path / "a", None, False), run_folder(tmp_path / "b", None, False):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def foreign_folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def foreign_shard(path):
    path.mkdir()
    (path / "model-00001-of-00002.safetensors").write_text("mine")


def foreign_resume(path):
    (path / "resume").mkdir(parents=True)
    (path / "resume" / "run.json").write_text("{}")


def foreign_file(path):
    path.write_text("mine")


def foreign_link(path):
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("make", [foreign_folder, foreign_shard, foreign_resume, foreign_file, foreign_link])
@pytest.mark.parametrize("resume", [False, True])
def test_what_the_user_has_at_the_place_of_the_folder_stays(tmp_path, make, resume):
    make(tmp_path / "out.partial")
    before = sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*"))
    refused(tmp_path / "out", r"^\S+/out\.partial is in the way, and not from `bpdq quantize`: move it away", resume)
    assert sorted((path, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")) == before


def test_a_file_of_the_users_in_the_folder_is_named_and_stays(tmp_path):
    stopped(tmp_path / "out")
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt is not of this run: move it away"):
        go_on(tmp_path / "out", files=["model-00001-of-00002.safetensors"])
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"


def existing(folder):
    (folder / "out").mkdir()
    return folder / "out"


def dangling(folder):
    (folder / "out").symlink_to(folder / "nothing")
    return folder / "out"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (existing, "exists already"),
        (dangling, "exists already"),
        (lambda _: "", "--output is empty"),
        (lambda _: ".", "exists already"),
        (lambda _: "/", "exists already"),
        (lambda folder: folder / "new" / "..", "exists already"),
        (lambda folder: folder / ("x" * 250), "can't be written: .*File name too long"),
        (lambda folder: "/".join([str(folder), *["x" * 200] * 30]), "can't be written: .*File name too long"),
        (lambda folder: f"{folder}/a\0b", "can't be written: embedded null"),
        (lambda _: "/proc/out", "can't be written"),
    ],
)
def test_an_output_that_can_not_be_created_is_refused_before_any_work(tmp_path, make, message):
    output = make(tmp_path)
    before = sorted(tmp_path.iterdir())
    refused(output, message)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("inside", ["out", "out/states", "out.partial", "out.partial/a/b", "new/../out"])
def test_states_in_the_folder_itself_are_refused_before_any_work(tmp_path, inside):
    with (
        pytest.raises(InputError, match=r"^--offload-dir .* is in the checkpoint's folder: name one beside it$"),
        run_folder(tmp_path / "out", str(tmp_path / inside), False),
    ):
        pytest.fail("a run has started")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_appears_meanwhile_is_not_touched_and_the_work_is_kept(tmp_path):
    stopped(tmp_path / "out")
    run = run_folder(tmp_path / "out", None, True)
    begin(run.__enter__(), {"bits": 2}, [])
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="has appeared since the run began") as error:
        run.__exit__(None, None, None)
    assert "repeat the command with --resume" in error.value.__notes__[0]
    (tmp_path / "out").rmdir()
    go_on(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_fails_early_leaves_nothing_behind(tmp_path):
    with pytest.raises(Stop) as stop:
        crash(tmp_path / "out", offload=str(tmp_path / "states"), worth=False)
    assert not hasattr(stop.value, "__notes__"), "there is nothing to go on from"
    assert [path.name for path in tmp_path.iterdir()] == ["states"]
    assert not list((tmp_path / "states").iterdir())


def test_a_resumed_run_that_has_nothing_to_go_on_from_says_so(tmp_path, capsys):
    stopped(tmp_path / "out")
    go_on(tmp_path / "out")
    assert capsys.readouterr().err == ""
    go_on(tmp_path / "otu")
    said = capsys.readouterr().err
    assert (
        said == f"{tmp_path}/otu.partial holds nothing that --resume could go on from: starting from the first block\n"
    )


def test_what_makes_the_tensors_differ_is_named_with_its_remedy(tmp_path):
    stopped(tmp_path / "out", {"bits": 2, "threads": 4, "release": "0.1.0"})
    with pytest.raises(InputError) as error:
        go_on(tmp_path / "out", {"bits": 3, "threads": 2, "release": "0.2.0"})
    assert "bits = 2 (now 3), threads = 4 (now 2), release = '0.1.0' (now '0.2.0'): repeat them" in str(error.value)
    assert "set OMP_NUM_THREADS=4, install vllm-bpdq 0.1.0" in str(error.value)
    assert (tmp_path / "out.partial" / "resume" / "schemes.json").is_file()


def test_an_empty_lock_of_a_full_disk_makes_no_folder_foreign(tmp_path):
    stopped(tmp_path / "out")
    (tmp_path / "out.partial" / "resume" / "lock").write_text("")
    go_on(tmp_path / "out")


def killed_at(output, renames, offload):
    """A finished run that is killed after so many of the renames that give its folder its name."""
    child = os.fork()
    if not child:
        done, rename = [], os.rename

        def rename_or_die(*args):
            rename(*args)
            done.append(args)
            if len(done) == renames:
                os.kill(os.getpid(), signal.SIGKILL)

        with run_folder(output, offload, False) as folder:
            begin(folder, {"bits": 2, "offload_dir": offload}, [])
            keep(folder)
            (folder.offload / "000000000001.safetensors").write_text("states")
            os.rename = rename_or_die
        os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("named", [True, False])
def test_a_run_killed_after_its_folder_has_its_name_is_tidied_up(tmp_path, named):
    states = tmp_path / "states"
    killed_at(tmp_path / "out", 2, str(states))
    assert not (tmp_path / "out" / "resume").exists()
    with (
        pytest.raises(InputError, match="exists already: a run that was stopped at its very end had finished it"),
        run_folder(tmp_path / "out", str(states) if named else None, True),
    ):
        pytest.fail("a run has started")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "states"]
    assert not list(states.iterdir())


def test_a_run_killed_just_before_that_loses_nothing(tmp_path):
    killed_at(tmp_path / "out", 1, str(tmp_path / "states"))
    refused(tmp_path / "out", "add --resume")
    with run_folder(tmp_path / "out", str(tmp_path / "states"), True) as folder:
        begin(folder, {"bits": 2, "offload_dir": str(tmp_path / "states")}, [])
        assert (folder.resume / "schemes.json").is_file()
        assert (folder.offload / "000000000001.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "states"]
    assert not list((tmp_path / "out").iterdir())
    assert not list((tmp_path / "states").iterdir())


def test_a_run_stopped_while_it_tidies_up_says_so_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("bpdq_quantizer.run.run_folder.sync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), run_folder(tmp_path / "out", None, False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_user_has_where_a_finished_run_puts_its_state_stays(tmp_path):
    foreign_folder(tmp_path / "out.resume")
    refused(tmp_path / "out", r"out\.resume is in the way, and not from `bpdq quantize`: move it away")
    assert [path.name for path in tmp_path.iterdir()] == ["out.resume"]

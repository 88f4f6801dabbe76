"""`bpdq push` and `bpdq quantize --push-to-hub`, against a stand-in for the Hub that speaks its HTTP."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import bpdq_quantizer
from bpdq_quantizer.checkpoint import hub as publishing
from bpdq_quantizer.checkpoint.manifest import verify
from bpdq_quantizer.cli import main
from bpdq_quantizer.errors import InputError
from bpdq_quantizer.run import pipeline
from hub_stub import TOKEN, Repository, running
from tiny import TEXT, tiny_model

REPO = "me/tiny-bpdq"
SMALL = {"samples": 2, "seq_len": 32, "iterations": 1, "solver": "paper"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    tiny_model(root / "tiny")
    (root / "tiny" / "modules.json").write_text(
        '[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    )
    (root / "tiny" / "1_Pooling").mkdir()
    (root / "tiny" / "1_Pooling" / "config.json").write_text("{}")
    (root / "text.txt").write_text(TEXT)
    bpdq_quantizer.quantize(root / "tiny", root / "tiny-bpdq", calibration=root / "text.txt", **SMALL)
    return root / "tiny-bpdq"


@pytest.fixture
def hub(monkeypatch):
    with running() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def held(hub, repo: str = REPO) -> dict[str, bytes]:
    return {name: data for name, data in hub.repositories[repo].files.items() if name != ".gitattributes"}


def refused(capsys, *argv: str) -> str:
    """The one line of `bpdq`, with exit status 2, and nothing of the token in it."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert TOKEN not in captured.out + captured.err
    assert "Traceback" not in captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("bpdq: error: ")]
    return line


@pytest.mark.parametrize("repo", [REPO, "team/x"])
def test_what_is_pushed_is_the_checkpoint(hub, checkpoint, tmp_path, capsys, repo):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.metadata").write_text("1")
    (folder / "resume").mkdir()
    (folder / "resume" / "lock").write_text("{}")
    before = content(folder)
    assert main(["push", str(folder), repo]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.url}/{repo}: {len(content(checkpoint))} files, ")
    assert held(hub, repo) == content(checkpoint)
    assert "1_Pooling/config.json" in held(hub, repo)
    assert not hub.repositories[repo].private
    assert content(folder) == before, "nothing is written into the folder"
    assert verify(folder)


def test_private_means_a_private_repository(hub, checkpoint):
    publishing.push(checkpoint, REPO, private=True)
    assert hub.repositories[REPO].private
    hub.repositories[REPO] = Repository()
    with pytest.raises(InputError, match=f"{REPO} is public: make it private"):
        publishing.push(checkpoint, REPO, private=True)


def test_an_upload_that_was_cut_goes_on(hub, checkpoint, capsys):
    hub.fails = (1, 403)
    line = refused(capsys, "push", str(checkpoint), REPO)
    assert "signed" not in line
    assert line.endswith(f"{checkpoint} is whole, and `bpdq push {checkpoint} {REPO}` goes on from here")
    sent, hub.fails = list(hub.puts), None
    assert len(sent) == 1
    assert held(hub) == {}, "a commit holds all of it or nothing"
    assert main(["push", str(checkpoint), REPO]) == 0
    assert held(hub) == content(checkpoint)
    assert len(set(hub.puts)) == len(hub.puts) > 2, "nothing is sent twice"
    assert main(["push", str(checkpoint), REPO]) == 0, "nor is anything left to do"
    assert hub.repositories[REPO].commits == 2


def test_a_part_of_this_checkpoint_may_be_there(hub, checkpoint):
    """hf_xet uploads commit many files in several parts."""
    files = content(checkpoint)
    part = dict(list(files.items())[::2])
    hub.repositories[REPO] = Repository(files={".gitattributes": b"", **part})
    publishing.push(checkpoint, REPO)
    assert held(hub) == files


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors", "config.json", "other.bin"])
def test_other_files_are_overwritten_by_force_only(hub, checkpoint, capsys, name):
    hub.repositories[REPO] = Repository(files={".gitattributes": b"", name: b"precious"})
    line = refused(capsys, "push", str(checkpoint), REPO)
    assert f"{REPO} holds {name}: name another repository, or replace all that it holds with --force" in line
    assert held(hub) == {name: b"precious"}
    assert hub.puts == []
    assert main(["push", str(checkpoint), REPO, "--force"]) == 0
    assert held(hub) == content(checkpoint)
    assert ".gitattributes" in hub.repositories[REPO].files


def test_what_others_commit_meanwhile_is_not_overwritten(hub, checkpoint, monkeypatch):
    hub.repositories[REPO] = Repository()
    original = publishing.check

    def check(*args):
        found = original(*args)
        hub.repositories[REPO].files["theirs.txt"] = b"theirs"
        hub.repositories[REPO].commits += 1
        return found

    monkeypatch.setattr(publishing, "check", check)
    with pytest.raises(InputError, match="others have changed it meanwhile"):
        publishing.push(checkpoint, REPO)
    assert held(hub) == {"theirs.txt": b"theirs"}


@pytest.mark.parametrize(
    ("repo", "token", "role", "message"),
    [
        ("no-owner", TOKEN, {}, "no-owner is no name of a repository (it has no owner): expected OWNER/NAME"),
        ("me/a b", TOKEN, {}, "me/a b is no name of a repository"),
        ("me/a--b", TOKEN, {}, "is no name of a repository"),
        (REPO, None, {}, "there is no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN"),
        (REPO, "hf_bad", {}, "the Hub refuses (Invalid user token"),
        (REPO, TOKEN, {"role": "read"}, "this Hugging Face token may only read: log in"),
        (
            *(REPO, TOKEN, {"fineGrained": {"scoped": [{"permissions": ["repo.content.read"]}]}}),
            "this Hugging Face token may only read: log in",
        ),
        ("you/x", TOKEN, {}, "you/x: me is no member of it: name a repository of your own"),
        ("readers/x", TOKEN, {}, "readers/x: me may only read there"),
    ],
)
def test_what_cannot_be_published_is_said_before_the_model_is_opened(
    hub, tmp_path, monkeypatch, capsys, repo, token, role, message
):
    monkeypatch.setattr(pipeline, "prepare", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    hub.role |= role
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    out = tmp_path / "out"
    line = refused(capsys, "quantize", "m", "--output", str(out), "--push-to-hub", repo)
    assert message in line
    assert "hf_bad" not in line
    assert list(tmp_path.iterdir()) == []


def test_a_repository_with_files_is_refused_before_the_model_is_opened(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "prepare", lambda *_: pytest.fail("work has begun"))
    hub.repositories[REPO] = Repository(files={".gitattributes": b"", "a": b"", "b": b"", "c": b"", "d": b""})
    line = refused(capsys, "quantize", "m", "--output", str(tmp_path / "out"), "--push-to-hub", REPO)
    assert f"{REPO} holds a, b, c and 1 more" in line
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_one_sentence_says_so(hub, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    assert f"{REPO}: the Hub can't be reached or used (" in refused(capsys, "push", str(checkpoint), REPO)


def test_a_folder_that_is_no_whole_checkpoint_stays_here(hub, checkpoint, tmp_path, capsys):
    assert "no such folder" in refused(capsys, "push", str(tmp_path / "none"), REPO)
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "config.json").write_text("{}")
    assert "config.json has changed" in refused(capsys, "push", str(folder), REPO)
    assert hub.calls == []


@pytest.mark.parametrize("option", ["private", "force"])
def test_options_of_an_upload_need_one(option):
    with pytest.raises(InputError, match="--private and --force are of --push-to-hub"):
        bpdq_quantizer.quantize("m", "out", **{option: True})


def test_a_checkpoint_that_cannot_be_uploaded_stays(hub, checkpoint, tmp_path, capsys):
    hub.fails = (0, 403)
    model, text, out = checkpoint.parent / "tiny", checkpoint.parent / "text.txt", tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    argv = ["quantize", str(model), "--output", str(out), "--calibration", str(text), *options, "--push-to-hub", REPO]
    assert f"`bpdq push {out} {REPO} --private` goes on from here" in refused(capsys, *argv, "--private")
    assert verify(out)
    hub.fails = None
    assert main(["push", str(out), REPO, "--private"]) == 0
    assert held(hub) == content(out)


def test_a_run_ends_on_the_hub_and_the_token_is_nowhere(hub, checkpoint, tmp_path):
    """As a user runs it: a process with HF_ENDPOINT and HF_TOKEN."""
    model, text, out = checkpoint.parent / "tiny", checkpoint.parent / "text.txt", tmp_path / "out"
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    argv = ["quantize", model, "--output", out, "--calibration", text, *options, "--push-to-hub", REPO, "--json"]
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_VERBOSITY": "debug"}
    done = subprocess.run([sys.executable, "-m", "bpdq_quantizer", *map(str, argv)], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert held(hub) == content(out)
    assert f"uploaded to {REPO}" in done.stdout.decode()
    assert hub.calls.index("GET /api/whoami-v2") < hub.calls.index("POST /api/repos/create")
    for data in (done.stdout, done.stderr, *content(out).values()):
        assert TOKEN.encode() not in data

"""`pip install .`: the same commands by name, from any folder, with all that they need."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nanosport

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def run(*command, **options) -> subprocess.CompletedProcess:
    how = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([*map(str, command)], **how, **options)


@pytest.fixture(scope="module")
def there(tmp_path_factory) -> Path:
    """A folder that pip has installed into, from a copy of what git tracks: a build leaves files in
    its source."""
    if run(sys.executable, "-m", "pip", "--version").returncode or not (ROOT / ".git").exists():
        pytest.skip("needs pip, and git's list of files")
    folder = tmp_path_factory.mktemp("install")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in run(*listed, cwd=ROOT).stdout.split("\0"):
        if name and not name.startswith(("tests/", "results/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", "-q", *offline, "--target", folder / "there"]
    done = run(*pip, folder / "source")
    assert done.returncode == 0, done.stderr
    return folder / "there"


@pytest.fixture
def installed(there, tmp_path):
    """Run an installed command in an empty folder."""

    def call(name: str, *arguments) -> subprocess.CompletedProcess:
        assert {path.name for path in (there / "bin").iterdir()} == set(SCRIPTS)
        env = os.environ | {"PYTHONPATH": str(there)}
        return run(there / "bin" / name, *arguments, cwd=tmp_path, env=env)

    return call


def test_there_is_a_name_for_each_command():
    texts = {
        path: path.read_text()
        for pattern in ("*.py", "data_prep/*.py", "nanosport/*/__main__.py")
        for path in ROOT.glob(pattern)
    }
    commands = [path for path, text in texts.items() if 'if __name__ == "__main__"' in text]
    names = {path.parent.name if path.stem == "__main__" else path.stem for path in commands}
    assert {f"nanosport-{name}" for name in names} == set(SCRIPTS)


def test_an_installed_command_plays_and_shows(installed, arena_folder):
    clip = arena_folder / "clips" / "test_00000.mp4"
    done = installed("nanosport-infer", clip, "Call the decisive play.")
    assert done.returncode == 0 and "\nanswer  " in done.stdout, done.stderr
    done = installed("nanosport-report", "--version")
    assert done.stdout == f"nanosport {nanosport.__version__}, commit unknown\n"


def test_what_is_no_code_is_installed_too(there):
    for pattern in ("assets/*/*.json", "assets/*/*.safetensors", "nanosport/*/page.*"):
        names = [{str(p.relative_to(f)) for p in f.glob(pattern)} for f in (ROOT, there)]
        assert names[0] == names[1] and names[0]


def test_a_command_says_its_version_and_commit():
    done = run(sys.executable, "-m", "nanosport.bench.demo", "--version", cwd=ROOT)
    wanted = rf"nanosport {re.escape(nanosport.__version__)}, commit [0-9a-z-]+\n"
    assert re.fullmatch(wanted, done.stdout), done


def test_a_shell_completes_flags_and_nothing_else(installed, tmp_path):
    done = installed("nanosport-infer", "--tyro-print-completion", "bash")
    script = tmp_path / "completion"
    script.write_text(done.stdout)
    ask = """source "$0"; COMP_WORDS=(nanosport-infer "$1"); COMP_CWORD=1
    COMP_LINE="nanosport-infer $1"; COMP_POINT=${#COMP_LINE}
    function=$(complete -p nanosport-infer | sed 's/.*-F \\([^ ]*\\).*/\\1/')
    $function nanosport-infer "$1" nanosport-infer; printf '%s\\n' "${COMPREPLY[@]}"
    """
    for typed, flags in (("--mod", ["--model"]), ("--st", ["--start", "--stream", "--strip"])):
        said = run("bash", "-c", ask, script, typed).stdout.split("\n")[:-1]
        assert sorted(line.split()[0] for line in said) == flags, said
    # where a file is meant, the shell goes on to names of files
    assert run("bash", "-c", ask, script, "clip_").stdout.strip() == ""
    assert "complete -o default -F" in done.stdout
    clip = tmp_path / "clip_0.mp4"
    clip.touch()
    assert run("bash", "-c", ask, script, f"{tmp_path}/cl").stdout.strip() == str(clip)


def test_a_shell_without_completion_is_one_line(installed):
    done = installed("nanosport-infer", "--tyro-print-completion", "tcsh")
    assert done.returncode and done.stderr.splitlines()[-1].endswith("bash, zsh or fish"), done
    assert "Traceback" not in done.stderr

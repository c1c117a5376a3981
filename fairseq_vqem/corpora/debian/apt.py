"""Package files through apt, in private folders: the machine's own package state is not touched."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from tqdm import tqdm

from fairseq_vqem.corpora.files import READ_CHUNK
from fairseq_vqem.errors import UserError

APT_HELPER = Path("/usr/lib/apt/apt-helper")
REQUIRED_PROGRAMS = ("apt-get", "apt-cache", "dpkg-deb")
DOWNLOAD_BATCH = 10
CANDIDATE = re.compile(r"^(\S+):\n  Installed: .*\n  Candidate: (\S+)", re.MULTILINE)
TRANSLATION_INDEX = re.compile(r"_main_i18n_Translation-([A-Za-z_]+)(\.\w+)?$")
MINOR_SUITES = ("security", "updates", "backports")
WANTED_FILES = (
    "*.mo",
    "*.html",
    "*.docbook",
    "*.page",
    "*/man/*.gz",
    "*/trans/de-en",
    "*dialogs_*.lua",
    "*/demo_*.lua",
)


class PackageStore:
    """Downloads and unpacks packages below one folder; what is there already is not fetched again.

    Attributes:
        versions: name -> version of each package that was unpacked.
    """

    def __init__(self, folder: Path, lang: str) -> None:
        """Prepare the folder; nothing is fetched before the first use.

        Raises:
            UserError: a program of apt or dpkg is missing.
        """
        missing = [program for program in REQUIRED_PROGRAMS if shutil.which(program) is None]
        if missing:
            raise UserError(
                f"{' and '.join(missing)} not found; this corpus needs a Debian system with apt "
                "and dpkg (a container of Debian 12 will do)."
            )
        self.folder = folder.resolve()
        self.lang = lang
        self.versions: dict[str, str] = {}
        self._updated = False

    def fetch(self, packages: Sequence[str]) -> dict[str, Path]:
        """Return the unpacked folder of each package that exists; others are left out.

        Raises:
            UserError: the package index or a package could not be fetched.
        """
        self._update_index()
        versions = self._candidates(packages)
        missing = [name for name in versions if not self._archives(name, versions[name])]
        batches = range(0, len(missing), DOWNLOAD_BATCH)
        for start in tqdm(batches, desc="downloading", unit="batch", disable=None):
            self._download(missing[start : start + DOWNLOAD_BATCH])
        folders = {}
        for name in tqdm(versions, desc="unpacking", unit="package", disable=None):
            folders[name] = self._unpack(name, versions[name])
        self.versions.update(versions)
        return folders

    def description_index(self, lang: str) -> str | None:
        """Return the package descriptions in `lang` (a few MB), or None if apt has none."""
        self._update_index()
        files = []
        for path in sorted((self.folder / "lists").iterdir()):
            match = TRANSLATION_INDEX.search(unquote(path.name))  # pt%5fBR
            if match and match[1] == lang and not any(s in path.name for s in MINOR_SUITES):
                files.append(str(path))
        if not files or not APT_HELPER.is_file():
            return None
        return self._run([str(APT_HELPER), "cat-file", *files], "read the package descriptions")

    def _update_index(self) -> None:
        if self._updated:
            return
        for name in ("lists/partial", "cache/archives/partial", "packages", "unpacked"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "apt.conf").write_text(
            f'Dir::State::lists "{self.folder}/lists";\n'
            f'Dir::Cache "{self.folder}/cache";\n'
            'APT::Sandbox::User "root";\n',
            encoding="utf-8",
        )
        # Given in a configuration file, the languages would not be fetched.
        languages = f"Acquire::Languages={self.lang},en"
        command = ["apt-get", "-qq", "update", "-o", languages, "-o", "APT::Update::Error-Mode=any"]
        self._run(command, "fetch the package index")
        self._updated = True

    def _candidates(self, packages: Sequence[str]) -> dict[str, str]:
        if not packages:
            return {}
        policy = self._run(["apt-cache", "policy", *packages], "look up packages")
        found = {
            name: version for name, version in CANDIDATE.findall(policy) if version != "(none)"
        }
        return {name: found[name] for name in packages if name in found}

    def _archives(self, name: str, version: str) -> list[Path]:
        pattern = f"{name}_{_quoted(version)}_*.deb"
        return sorted((self.folder / "packages").glob(pattern))

    def _download(self, names: Sequence[str]) -> None:
        partial = self.folder / "packages" / "partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        self._run(["apt-get", "-qq", "download", *names], "download packages", cwd=partial)
        for archive in partial.iterdir():
            os.replace(archive, partial.parent / archive.name)
        partial.rmdir()

    def _unpack(self, name: str, version: str) -> Path:
        folder = self.folder / "unpacked" / f"{name}_{_quoted(version)}"
        if folder.is_dir():
            return folder
        partial = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        self._extract(self._archives(name, version)[-1], partial)
        os.replace(partial, folder)
        return folder

    def _extract(self, archive: Path, folder: Path) -> None:
        folder.mkdir()
        _extract_package(archive, folder)

    def _run(self, command: list[str], purpose: str, cwd: Path | None = None) -> str:
        environment = {
            **os.environ,
            "APT_CONFIG": str(self.folder / "apt.conf"),
            # Output in another language could not be parsed.
            "LC_ALL": "C.UTF-8",
        }
        result = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            details = result.stderr.strip().splitlines() or ["no message"]
            raise UserError(
                f"Could not {purpose}: {command[0]} says '{details[0]}'; check the network "
                "connection and that apt has package sources, then run again."
            )
        return result.stdout


def _quoted(version: str) -> str:
    """A version as apt writes it into the name of a package's file."""
    return version.replace(":", "%3a")


def _extract_package(archive: Path, folder: Path) -> None:
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    problem: Exception | None = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as members:
                _extract_wanted(members, folder)
            # Whatever follows the last member must be read, or dpkg-deb seems to have failed.
            while process.stdout.read(READ_CHUNK):
                pass
        except tarfile.TarError as error:
            problem = error
    if problem is not None or process.returncode != 0:
        raise UserError(f"{archive} is damaged; delete it and run again.") from problem


def _extract_wanted(members: Iterable[tarfile.TarInfo], folder: Path) -> None:
    assert isinstance(members, tarfile.TarFile)
    for member in members:
        path = PurePosixPath(member.name)
        wanted = any(fnmatch(member.name, pattern) for pattern in WANTED_FILES)
        if not (member.isreg() and wanted) or ".." in path.parts:
            continue
        content = members.extractfile(member)
        if content is not None:
            target = folder.joinpath(*[part for part in path.parts if part not in ("/", ".")])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content.read())

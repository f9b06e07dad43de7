"""Files around the code: the address of the repository, versions, distributions, workflows."""

import importlib.machinery
import importlib.util
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import eigenlorax
from adapters import make_adapters
from eigenlorax.core import keys

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SOURCE = PROJECT["urls"]["Source"]


def text(name):
    return (ROOT / name).read_text("utf-8")


def test_addresses_of_the_repository_are_that_of_pyproject():
    owner, name = SOURCE.rsplit("/", 2)[1:]
    assert PROJECT["urls"]["Documentation"] == f"https://{owner}.github.io/{name}/"
    files = [ROOT / file for file in ("pyproject.toml", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "README.md")]
    files += [*(ROOT / ".github").rglob("*.yml"), *(ROOT / "docs").glob("*.md")]
    addresses = [
        address
        for file in files
        for address in re.findall(rf"https://github\.com/[\w-]+/{name}\b", file.read_text("utf-8"))
    ]
    assert len(addresses) >= 5
    assert set(addresses) == {SOURCE}


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {eigenlorax.__version__}\n" in text("CITATION.cff")
    assert re.fullmatch(r"\d+\.\d+\.\d+", eigenlorax.__version__)
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] – \d{4}-\d{2}-\d{2}$", text("CHANGELOG.md"), re.MULTILINE)
    assert released[0] == eigenlorax.__version__


@pytest.fixture(scope="module")
def check_dist():
    loader = importlib.machinery.SourceFileLoader("check_dist", str(ROOT / "scripts" / "check-dist"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("check_dist", loader))
    loader.exec_module(module)
    return module


INFO = "eigenlorax-1.2.3.dist-info"
LICENCE = "train/demo_data/roberta-portuguese/LICENSE"
PACKAGE = {"eigenlorax/__init__.py": b"", "eigenlorax/py.typed": b"", f"eigenlorax/{LICENCE}": b"MIT"}
WHEEL = {
    **PACKAGE,
    f"{INFO}/METADATA": b"Metadata-Version: 2.4\nName: eigenlorax\nVersion: 1.2.3\n\n[a](https://a.example) [b](#b)\n",
    f"{INFO}/licenses/LICENSE": b"Apache",
    f"{INFO}/licenses/src/eigenlorax/{LICENCE}": b"MIT",
}
DATA = "src/eigenlorax/train/demo_data"
SDIST = {
    **dict.fromkeys(["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/conftest.py"], b""),
    f"{DATA}/adapters.json": b"{}",
    f"{DATA}/adapters/a/adapter_model.safetensors": b"a" * 30_000,
}


class TestDistributions:
    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({}, None),
            ({"eigenlorax/py.typed": None}, "lacks eigenlorax/py.typed"),
            ({"tests/conftest.py": b""}, "has tests/conftest.py, which is not in src/"),
            ({"eigenlorax/__init__.py": b"import os"}, "eigenlorax/__init__.py differs"),
            ({f"{INFO}/licenses/LICENSE": None}, f"lacks {INFO}/licenses/LICENSE"),
            ({f"{INFO}/METADATA": WHEEL[f"{INFO}/METADATA"].replace(b"1.2.3", b"1.2.4")}, "state version 1.2.4"),
            ({f"{INFO}/METADATA": WHEEL[f"{INFO}/METADATA"] + b"[c](docs/c.md)"}, "leads nowhere on PyPI: docs/c.md"),
        ],
    )
    def test_faults_of_a_wheel(self, check_dist, change, fault):
        files = {path: content for path, content in {**WHEEL, **change}.items() if content is not None}
        found = check_dist.faults_of_wheel("eigenlorax-1.2.3-py3-none-any.whl", 1000, files, PACKAGE, "1.2.3")
        assert bool(found) == (fault is not None)
        assert fault is None or any(fault in one for one in found)

    @pytest.mark.parametrize(
        ("change", "fault"),
        [
            ({}, None),
            ({"CHANGELOG.md": None}, "lacks CHANGELOG.md"),
            ({"copy.safetensors": b"a" * 30_000}, "the same file 2 times"),
            ({"copy.json": b"{}"}, None),
        ],
    )
    def test_faults_of_an_sdist(self, check_dist, change, fault):
        files = {path: content for path, content in {**SDIST, **change}.items() if content is not None}
        found = check_dist.faults_of_sdist("eigenlorax-1.2.3.tar.gz", 1000, files, "1.2.3")
        assert bool(found) == (fault is not None)
        assert fault is None or any(fault in one for one in found)

    def test_names_and_sizes(self, check_dist):
        (name,) = check_dist.faults_of_sdist("eigenlorax-1.2.4.tar.gz", 1000, SDIST, "1.2.3")
        (size,) = check_dist.faults_of_sdist("eigenlorax-1.2.3.tar.gz", 20_000_000, SDIST, "1.2.3")
        assert "should be eigenlorax-1.2.3.tar.gz" in name
        assert "20,000,000 bytes, the limit is" in size
        name, size = check_dist.faults_of_wheel("eigenlorax-1.2.3-cp311.whl", 9_000_000, WHEEL, PACKAGE, "1.2.3")
        assert "should be eigenlorax-1.2.3-py3-none-any.whl" in name
        assert "9,000,000 bytes, the limit is 8,000,000" in size


WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TESTS = ROOT / ".github" / "workflows" / "tests.yml"


def load(path):
    # YAML 1.1 reads the key `on` as True
    return yaml.safe_load(path.read_text("utf-8"))


class TestWorkflows:
    @pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
    def workflow(self, request):
        return load(request.param)

    def test_actions_are_pinned_by_commit_and_are_the_same_in_all(self):
        used = [line for path in WORKFLOWS for line in re.findall(r"uses: (.*)", path.read_text("utf-8"))]
        assert len(used) > 10
        for line in used:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line), line
        assert len(set(used)) == len({line.partition("@")[0] for line in used})

    def test_permissions_are_stated_and_writing_is_one_jobs(self, workflow):
        assert workflow["permissions"] in ({}, {"contents": "read"})
        assert "concurrency" in workflow
        for job in workflow["jobs"].values():
            writing = {scope for scope, access in job.get("permissions", {}).items() if access == "write"}
            assert writing <= {"contents", "id-token", "pages"}
            # what may write runs no code of the checkout
            assert not writing or not any("checkout" in step.get("uses", "") for step in job["steps"])
            assert job["timeout-minutes"] <= 90

    def test_scripts_tests_and_extras_in_commands_exist(self, workflow):
        for job in workflow["jobs"].values():
            commands = [step["run"] for step in job["steps"] if "run" in step]
            rows = job.get("strategy", {}).get("matrix", {}).get("include", [])
            paths = [path for row in rows for path in row.get("tests", "").split()]
            for command in commands:
                first, *others = shlex.split(command)
                paths += [first] if "/" in first else []
                assert "/" not in first or os.access(ROOT / first, os.X_OK), command
                assert first in ("eigenlorax", "gh", "grep", "mkdocs", "pip", "pytest", "uv") or "/" in first
                for extra in (name for word in others for name in re.findall(r"^\.\[(.*)\]$", word)):
                    assert extra in PROJECT["optional-dependencies"], command
            assert all((ROOT / path).exists() for path in paths)

    def test_the_tag_of_a_release_is_compared_with_the_version(self):
        steps = load(ROOT / ".github/workflows/release.yml")["jobs"]["build"]["steps"]
        (command,) = [step["run"] for step in steps if "GITHUB_REF_NAME" in step.get("run", "")]
        tag = command.replace("${GITHUB_REF_NAME#v}", eigenlorax.__version__)
        _, options, line, file = shlex.split(tag)
        assert options == "-qxF"
        assert line in text(file).splitlines()

    def test_pythons_are_those_of_the_classifiers(self):
        pythons = load(TESTS)["jobs"]["quick"]["strategy"]["matrix"]["python"]
        prefix = "Programming Language :: Python :: 3."
        minors = [one.removeprefix(prefix) for one in PROJECT["classifiers"] if one.startswith(prefix)]
        assert pythons == [f"3.{minor}" for minor in minors]
        assert PROJECT["requires-python"] == f">={pythons[0]}"
        assert "Python " + ", ".join(pythons[:-1]) + f" and {pythons[-1]}." in text("docs/support.md")


class TestSupportPage:
    def rows(self):
        table = text("docs/support.md").partition("\n## Packages\n")[2]
        return re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+|–) \| (.*) \|$", table, re.MULTILINE)

    def test_oldest_versions_are_the_lower_bounds(self):
        extras = PROJECT["optional-dependencies"]
        wanted = [Requirement(line) for line in PROJECT["dependencies"]]
        bounds = {one.name: (one.specifier, None) for one in wanted}
        for extra, lines in extras.items():
            for one in map(Requirement, lines):
                bounds.setdefault(one.name, (one.specifier, extra))
        for name, oldest, newest, use in self.rows():
            specifier, extra = bounds[name]
            assert str(specifier) == f">={oldest}", name
            assert f"`{extra}`" in use if extra else use == "everything"
            assert newest == "–" or Version(newest) >= Version(oldest)

    def test_what_extras_for_users_bring_is_there(self):
        named = {name for name, *_ in self.rows()}
        extras = PROJECT["optional-dependencies"]
        for extra in ("peft", "train", "diffusers", "metrics", "report", "search", "gguf", "trl", "ray", "vllm"):
            packages = {Requirement(line).name for line in extras[extra]} - {"eigenlorax", "pyyaml"}
            assert packages <= named


class TestHub:
    @pytest.fixture
    def entry(self):
        return text("scripts/hub/model-libraries.ts")

    def test_the_entry_has_the_projects_addresses_and_the_file_of_every_pack(self, entry):
        fields = dict(re.findall(r"^\t\t(\w+): [\"`](.*)[\"`],$", entry, re.MULTILINE))
        assert (fields["repoUrl"], fields["docsUrl"]) == (SOURCE, PROJECT["urls"]["Documentation"])
        assert fields["countDownloads"] == f'path:"{keys.MANIFEST}"'
        assert f"\t{fields['repoName']}: {{" in entry

    def test_the_snippet_runs(self, entry, tmp_path, monkeypatch, capsys):
        make_adapters(tmp_path / "in", "alpha beta")
        pack = eigenlorax.fit(tmp_path / "in", n_components=3).save(tmp_path / "pack")
        (code,) = re.findall(r"=> \[\n\t`(.*?)`,\n\];", entry, re.DOTALL)
        monkeypatch.chdir(tmp_path)
        exec(code.replace("${model.id}", pack.as_posix()), {})
        assert "['alpha', 'beta']" in capsys.readouterr().out
        assert (tmp_path / "loras/beta/adapter_model.safetensors").is_file()

    def test_peft_reads_the_configuration_of_its_comparison(self):
        peft = pytest.importorskip("peft", reason="PEFT is not installed: pip install '.[peft]'")
        (file,) = (ROOT / "scripts/hub/method_comparison").rglob("adapter_config.json")
        config = peft.PeftConfig.from_pretrained(str(file.parent))
        assert isinstance(config, eigenlorax.EigenLoraxConfig)
        assert f"rank{config.r}-" in file.parent.name

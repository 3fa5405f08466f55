"""The container without an image: what its build steps keep and refuse, and a start by an unknown user."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from runs import ROOT, overrides, write_corpus

from megatsp.training.logs import read_metrics

CONTAINER = ROOT / "launch/container"
STRANGER = 12345  # a uid that no user here has
# From this source, though the entry script drops PYTHONPATH.
MEGATSP = ("env", f"PYTHONPATH={ROOT}:{ROOT / 'kernels'}", sys.executable, "-m", "megatsp")
VENDOR = "2.12.0a0+5af1c2.nv26.5"  # how NVIDIA numbers its builds: of the range only as a pre-release


def requirements(name: str) -> list[Requirement]:
    lines = (CONTAINER / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_pins() -> None:
    """Each runtime dependency but torch is pinned, within pyproject.toml's range; nothing else is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {canonicalize_name(r.name): r.specifier for r in map(Requirement, project["dependencies"])}
    pins = {}
    for requirement in requirements("requirements.txt"):
        (pin,) = requirement.specifier
        assert pin.operator == "==", requirement
        pins[canonicalize_name(requirement.name)] = pin.version
    assert set(pins) == set(ranges) - {"torch"}
    assert [name for name, version in pins.items() if version not in ranges[name]] == []


def test_what_the_pins_depend_on_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the packages installed here tell, on the image's Python; but not what the base image brings."""
    monkeypatch.syspath_prepend(CONTAINER)
    lock, keep_base = importlib.import_module("lock"), importlib.import_module("keep_base")
    constraints = requirements("constraints.txt")
    assert all(str(r.specifier).startswith("==") and not r.marker for r in constraints)
    pins = {canonicalize_name(r.name): str(r.specifier) for r in constraints}
    direct = {canonicalize_name(r.name): str(r.specifier) for r in requirements("requirements.txt")}
    assert not pins.keys() & direct.keys()
    assert not [name for name in pins if keep_base.BASE.fullmatch(name)]
    assert {"certifi", "antlr4-python3-runtime"} < pins.keys()  # needed by dependencies of the pins
    needed = lock.closure(requirements("requirements.txt"))
    pinned = direct | pins
    if newer := [
        name for name, version in needed.items() if pinned.get(name, f"=={version}") != f"=={version}"
    ]:
        pytest.skip(f"other versions, which may need more, are installed here: {', '.join(newer)}")
    assert needed.keys() - pinned.keys() == set(), "python launch/container/lock.py pins them"


def test_build_tools_are_pinned() -> None:
    pins = {r.name: next(iter(r.specifier)) for r in requirements("requirements-build.txt")}
    assert all(pin.operator == "==" for pin in pins.values())
    (asked,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert pins["setuptools"].version in Requirement(asked).specifier


def dockerfile() -> list[tuple[str, str]]:
    """Instructions, each with the rest of its line."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    return re.findall("^([A-Z]+) +(.*)", text, re.MULTILINE)


def test_layers_that_take_long_are_kept() -> None:
    """Dependencies and apex depend on the files that they read: not on other files, nor on the commit."""
    steps = dockerfile()
    dependencies, apex, package, commit = (
        next(i for i, (_, rest) in enumerate(steps) if text in rest)
        for text in ("install.sh dependencies", "install.sh apex", "install.sh package", "COMMIT=")
    )
    assert dependencies < apex < package < commit
    assert (steps[commit][0], steps[commit + 1][0]) == ("ARG", "LABEL")
    ((_, copied),) = [step for step in steps[:apex] if step[0] == "COPY" or "--mount" in step[1]]
    read = re.findall(r"\$here/(\w[\w.-]*)", (CONTAINER / "install.sh").read_text())
    assert {Path(file).name for file in copied.split()[:-1]} == {"install.sh", *read}


def test_dockerfile() -> None:
    """Bases with a tag, files that are there, a user other than root; hadolint sees the rest."""
    steps = dockerfile()
    bases = [rest.split("=")[1] for name, rest in steps if name == "ARG" and rest.startswith("BASE_")]
    assert len(bases) == 2 and all(re.search(r":[^:]*\d", base) for base in bases)
    used = [rest.split()[0] for name, rest in steps if name == "FROM"]
    assert used == ["${BASE_ROCM}", "${BASE_CUDA}", "base-${GPU}"]
    assert [rest for name, rest in steps if name == "USER"] == ["10001:10001"]
    assert not [rest for name, rest in steps if name == "ADD" or "sudo" in rest]
    for name, rest in steps:
        if name == "COPY":
            *sources, _ = [word for word in rest.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), rest
    # Apptainer's recipe starts from the same images.
    recipe = (CONTAINER / "megatsp.def").read_text()
    assert all(base in recipe for base in bases)
    # What the wheel and the steps need gets past .dockerignore.
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "megatsp",
        "kernels",
        "configs",
        "launch/container",
        "launch/job.sh",
        "launch/profiles",
    } == kept
    for link in (path for path in (ROOT / "megatsp").rglob("*") if path.is_symlink()):
        target = link.resolve().relative_to(ROOT)
        assert kept & {str(target), *map(str, target.parents)}, f"{link} leads to what is left out"
        assert f"{target}" in recipe or f"{target.parent}" in recipe


def make_wheel(folder: Path, name: str, version: str, *requires: str, modules: dict[str, str]) -> Path:
    """A package of these files."""
    info = f"{name}-{version}.dist-info"
    files = {
        **modules,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + "".join(f"Requires-Dist: {r}\n" for r in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


class Image:
    """A Python with a vendor's torch, packages for pip, and the build steps with other requirements."""

    def __init__(self, folder: Path) -> None:
        self.wheels, self.steps, self.home = folder / "wheels", folder / "steps", folder / "home"
        self.wheels.mkdir()
        venv.create(folder / "base", with_pip=True)
        self.bin = folder / "base/bin"
        torch = {"torch.py": "import os\nclass version: hip = os.environ.get('HIP', '7.14') or None\n"}
        make_wheel(self.wheels, "torch", VENDOR, modules=torch)
        make_wheel(self.wheels, "torch", "2.13.0", modules=torch)  # what PyPI would offer
        make_wheel(self.wheels, "plain", "1.0", "torch<2.14,>=2.11", "below", modules={})
        make_wheel(self.wheels, "below", "1.0", modules={})
        make_wheel(self.wheels, "below", "2.0", modules={})
        make_wheel(self.wheels, "greedy", "1.0", "torch>=2.13", modules={})
        self.python("-m", "pip", "install", "-q", f"torch=={VENDOR}")
        shutil.copytree(CONTAINER, self.steps)
        (self.steps / "requirements-build.txt").write_text("")  # the wheels above are built already

    def python(self, *arguments: str | Path) -> str:
        return subprocess.check_output([self.bin / "python", *arguments], text=True, env=self.environment())

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
        path = f"{self.bin}:{os.environ['PATH']}"
        pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        return kept | pip | {"PATH": path, "MEGATSP_HOME": str(self.home)}

    def step(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", self.steps / "install.sh", *arguments], env=self.environment() | variables,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def torch(self) -> str:
        return self.python("-c", "import importlib.metadata as m; print(m.version('torch'))").strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return Image(tmp_path_factory.mktemp("image"))


def test_dependencies_keep_torch(image: Image) -> None:
    (image.steps / "requirements.txt").write_text("plain==1.0\n")
    (image.steps / "constraints.txt").write_text("below==1.0\n")
    result = image.step("dependencies")
    assert result.returncode == 0, result.stdout
    assert f"kept as they are: torch=={VENDOR}" in result.stdout
    assert "keep_base: unchanged: torch" in result.stdout
    assert image.torch() == VENDOR
    assert {"plain==1.0", "below==1.0"} < set((image.home / "versions.txt").read_text().split())


def test_dependencies_that_want_another_torch_are_refused(image: Image) -> None:
    (image.steps / "requirements.txt").write_text("greedy==1.0\n")
    result = image.step("dependencies")
    assert result.returncode != 0
    assert f"(constraint) torch=={VENDOR}" in result.stdout
    assert image.torch() == VENDOR


def test_a_changed_torch_is_seen(image: Image) -> None:
    """Whatever changed it: here a package manager that heeds no constraints."""
    image.step("apex", "none")
    image.python("-m", "pip", "install", "-q", "torch==2.13.0")
    try:
        result = image.step("apex", "none")
        assert result.returncode != 0
        assert f"torch was {VENDOR}, now 2.13.0" in result.stdout
    finally:
        image.python("-m", "pip", "install", "-q", f"torch=={VENDOR}")


# ROCm's amp_C: imports always, and without compiled kernels would compile them when one is asked for.
ROCM_AMP_C = """
import sys
class Module:
    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        from apex.git_version_info import installed_ops
        assert installed_ops["amp_C"], "compiled at the first step"
sys.modules[__name__] = Module()
"""
# NVIDIA's: found by the linker only once torch has loaded its libraries.
CUDA_AMP_C = """
import sys
if "torch" not in sys.modules:
    raise ImportError("libc10.so: cannot open shared object file")
multi_tensor_adam = 1
"""
# A source of ROCm's apex, built as its setup.py does: of two extensions those that the environment asks for.
ROCM_BACKEND = """
import os, shutil, zipfile
def build_wheel(folder, *_):
    shutil.copy("WHEEL", folder)
    asked = lambda op: any(name in os.environ for name in (f"APEX_BUILD_{op}", "APEX_BUILD_CUDA_OPS"))
    with zipfile.ZipFile(os.path.join(folder, "WHEEL"), "a") as wheel:
        ops = {"amp_C": asked("AMP_C"), "mlp_cuda": asked("MLP")}
        wheel.writestr("apex/git_version_info.py", f"installed_ops = {ops}")
    return "WHEEL"
"""


def apex_wheel(folder: Path, amp_c: str, **modules: str) -> Path:
    files = {"__init__": "", "optimizers": "FusedAdam = 1\n", **modules}
    modules = {f"apex/{name}.py": text for name, text in files.items()}
    return make_wheel(folder, "apex", "1.12.0", modules={**modules, "amp_C.py": amp_c})


@pytest.fixture
def no_apex(image: Image) -> Iterator[None]:
    yield
    image.python("-m", "pip", "uninstall", "-q", "-y", "apex")


@pytest.mark.usefixtures("no_apex")
def test_apex_of_the_base_or_from_source(image: Image, tmp_path: Path) -> None:
    """A project of the same name does not count; the base image's does, and then nothing is built."""
    namesake = make_wheel(tmp_path, "apex", "0.9", modules={"apex/__init__.py": ""})
    apex = apex_wheel(tmp_path, CUDA_AMP_C)
    result = image.step("apex", "auto", APEX_SOURCE=str(namesake), HIP="")
    assert result.returncode == 1, result.stdout
    missing = "ModuleNotFoundError: No module named "
    assert f"the base image has no usable apex ({missing}'amp_C'): building it from source" in result.stdout
    lacks = "install: the apex just built lacks FusedAdam or amp_C, its compiled kernels"
    assert f"\n{missing}'amp_C'\n{lacks}\n" in result.stdout
    result = image.step("apex", "source", APEX_SOURCE=str(apex), HIP="")
    assert result.returncode == 0, result.stdout
    result = image.step("apex", "auto", APEX_SOURCE=str(namesake), HIP="")
    assert result.returncode == 0 and "install: apex of the base image" in result.stdout, result.stdout


@pytest.mark.usefixtures("no_apex")
def test_apex_of_rocm_without_kernels_is_built(image: Image, tmp_path: Path) -> None:
    """It imports and has FusedAdam, and would compile on each node. Of its extensions one is asked for.

    From git, as by default: pip takes no such source of a version that is there already, unless forced.
    """
    kernels = "installed_ops = {'amp_C': %s}\n"
    lazy = apex_wheel(tmp_path, ROCM_AMP_C, git_version_info=kernels % False)
    image.python("-m", "pip", "install", "-q", lazy)
    assert image.python("-c", "import torch, amp_C; from apex.optimizers import FusedAdam") == ""
    source = tmp_path / "source"
    source.mkdir()
    wheel = apex_wheel(tmp_path, ROCM_AMP_C)
    backend = ROCM_BACKEND.replace("WHEEL", wheel.name)
    (source / "backend.py").write_text(backend)
    shutil.move(wheel, source)
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    git = ("git", "-C", source, "-c", "user.name=n", "-c", "user.email=e")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "m")):
        subprocess.run([*git, *command], check=True)

    result = image.step("apex", "auto", APEX_SOURCE=f"git+file://{source}")

    assert result.returncode == 0, result.stdout
    assert "no usable apex (ImportError: this apex was installed without amp_C compiled)" in result.stdout
    built = image.python("-c", "from apex.git_version_info import installed_ops as o; print(o)")
    assert built == "{'amp_C': True, 'mlp_cuda': False}\n"
    result = image.step("apex", "auto", APEX_SOURCE=str(lazy))
    assert result.returncode == 0 and "install: apex of the base image" in result.stdout, result.stdout


def test_base_without_torch_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-S", CONTAINER / "keep_base.py", "record", tmp_path / "base.txt"]
    result = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert result.returncode == 1
    assert "has no torch: choose a base image that brings it" in result.stderr
    assert not (tmp_path / "base.txt").exists()


def test_unknown_steps_are_refused(image: Image) -> None:
    assert "expected dependencies, apex or package" in image.step("all").stdout
    assert "apex maybe: expected auto, source or none" in image.step("apex", "maybe").stdout


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter, which tmp_path is not."""
    folder = Path(tempfile.mkdtemp(prefix="megatsp-container-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def start(folder: Path, *command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command through the entry script, without a home, as the stranger where we may become one."""
    # May read everything, as Python may be installed in root's home, and write only what is everyone's.
    become = [
        "setpriv", "--reuid", str(STRANGER), "--regid", str(STRANGER), "--clear-groups",
        "--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search",
    ]  # fmt: skip
    environment = {
        "PATH": os.environ["PATH"], "HOME": "/nonexistent",
        "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder / "tmp"),
    }  # fmt: skip
    return subprocess.run(
        [*(become if os.getuid() == 0 else []), "bash", CONTAINER / "entrypoint.sh", *command],
        cwd=folder, env=environment | variables, capture_output=True, text=True,
    )  # fmt: skip


def stray_files(uid: int, folder: Path) -> set[Path]:
    """What a user has in the places where everyone can write, outside a folder."""
    places = [Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")]
    found = set()
    for path in (path for place in places for path in place.iterdir() if path != folder):
        with suppress(FileNotFoundError):  # another test's, which has just removed it
            if path.lstat().st_uid == uid:
                found.add(path)
    return found


def test_training_by_a_user_without_home_or_name(open_folder: Path) -> None:
    corpus, temporary, output = (open_folder / name for name in ("data", "tmp", "out"))
    for folder in (corpus, temporary, output):
        folder.mkdir()
    for folder in (temporary, output):
        folder.chmod(0o777)
    prefix = write_corpus(corpus / "tiny")
    uid = STRANGER if os.getuid() == 0 else os.getuid()
    before = stray_files(uid, open_folder)

    assert "megatsp" in start(open_folder, *MEGATSP, "--version").stdout
    result = start(
        open_folder,
        *MEGATSP,
        "train",
        *overrides(prefix, output, "trainer.train_iters=2", "scheduler.lr_warmup_iters=1"),
    )

    assert result.returncode == 0, result.stderr
    assert f"HOME (/nonexistent) is not writable: caches go to {temporary}/megatsp-{uid}" in result.stderr
    metrics = read_metrics(next(output.rglob("metrics.jsonl")))
    assert [entry["iteration"] for entry in metrics if "lm loss" in entry] == [1, 2]
    assert stray_files(uid, open_folder) <= before
    assert {path.name for path in temporary.iterdir()} == {f"megatsp-{uid}"}


def test_entry_script_keeps_what_is_set(open_folder: Path) -> None:
    (open_folder / "tmp").mkdir()
    (open_folder / "tmp").chmod(0o777)
    show = ("bash", "-c", 'echo "$HF_HOME $TRITON_CACHE_DIR"')
    uid = STRANGER if os.getuid() == 0 else os.getuid()
    caches = open_folder / f"tmp/megatsp-{uid}"
    assert start(open_folder, *show, HF_HOME="/models").stdout == f"/models {caches}/triton\n"
    # With a home that can be written, nothing is set and nothing is said.
    result = start(open_folder, *show, HOME=str(open_folder / "tmp"))
    assert (result.stdout, result.stderr) == (" \n", "")


def test_packages_of_the_host_stay_out(open_folder: Path) -> None:
    """Those in the caller's home and on its PYTHONPATH; PYTHONHOME would lead to another standard library."""
    user = open_folder / f".local/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    variable = open_folder / "packages"
    for folder, name in ((user, "of_home"), (variable, "of_variable")):
        folder.mkdir(parents=True)
        (folder / f"{name}.py").touch()
    (open_folder / "tmp").mkdir()
    (open_folder / "tmp").chmod(0o777)
    find = "from importlib.util import find_spec as f; print(f('json') and 1, f('of_home'), f('of_variable'))"
    host = {"HOME": str(open_folder), "PYTHONPATH": str(variable)}
    # Not the virtual environment's python, which never looks in the home.
    python = os.path.realpath(sys.executable)
    plain = subprocess.run([python, "-c", find], env=host, capture_output=True, text=True).stdout
    assert plain.count("ModuleSpec") == 2
    result = start(open_folder, python, "-c", find, **host, PYTHONHOME="/nonexistent")
    assert (result.stdout, result.returncode) == ("1 None None\n", 0), result.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="needs a second user")
def test_caches_of_someone_else_are_refused(open_folder: Path) -> None:
    (open_folder / f"tmp/megatsp-{STRANGER}").mkdir(parents=True)  # root's
    result = start(open_folder, "true")
    assert result.returncode == 1
    assert "is not a folder of yours: set TMPDIR to one that you can write" in result.stderr


def test_enroot_configuration(tmp_path: Path) -> None:
    """The caller's variables and folder come along; paths of the host's installation do not."""
    script = f"source {CONTAINER / 'enroot.conf.sh'}; environ; mounts"
    variables = {"PATH": os.environ["PATH"], "SLURM_PROCID": "3", "PYTHONPATH": "/x", "NCCL_DEBUG": "INFO"}
    lines = subprocess.check_output(
        ["bash", "-c", script], cwd=tmp_path, env=variables, text=True
    ).splitlines()
    assert {"SLURM_PROCID=3", "NCCL_DEBUG=INFO", f"MEGATSP_FOLDER={tmp_path}"} <= set(lines)
    assert f"{tmp_path} {tmp_path} none x-create=dir,bind,rw" in lines
    assert not [line for line in lines if line.startswith(("PATH=", "PYTHONPATH="))]

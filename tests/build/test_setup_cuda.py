"""What is built for a given QLORA_KERNELS_CUDA_ARCHS, with or without GPUs and a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
from cuda_code import cuda_wheel
from cuda_code.cuda_wheel import ROOT, setup_cuda

from qlora_kernels.version import BASE


@pytest.fixture(autouse=True)
def bare(monkeypatch, tmp_path):
    """A machine without CUDA: no variables, no toolkit, no packages, no GPU."""
    for key in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "QLORA_KERNELS_CUDA_ARCHS"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(setup_cuda, "TOOLKIT", tmp_path / "no-toolkit")
    monkeypatch.setattr(setup_cuda, "_site_packages", lambda environment: [])
    monkeypatch.setattr(setup_cuda, "cards", lambda: [])


def nvcc_at(folder: Path, release: str = "13.0", codes: str = "75 80 86 89 90 100 120", runtime: bool = True) -> Path:
    """A toolkit's folder with a fake nvcc that reports a given release."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").mkdir()
    if runtime:
        (folder / "lib" / "libcudart_static.a").touch()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f'  --version) echo "Cuda compilation tools, release {release}, V{release}.0" ;;\n'
        f'  --list-gpu-code) for n in {codes}; do echo "sm_$n"; done ;;\n'
        f'  --list-gpu-arch) for n in {codes}; do echo "compute_$n"; done ;;\n'
        f'  --dryrun) echo "#$ TOP={folder}/bin/.." >&2 ;;\n'
        "  *) echo 'nvcc fatal : no' >&2; exit 1 ;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return nvcc


def plan(archs: str | None = None, **environment: object) -> setup_cuda.Plan:
    asked = {} if archs is None else {"QLORA_KERNELS_CUDA_ARCHS": archs}
    return setup_cuda.plan({"PATH": "", **asked, **{key: str(value) for key, value in environment.items()}})


# -------------------------------------------------------------------------------------------------------- variable


@pytest.mark.parametrize("archs", [None, "native", "none", "None", " native "])
def test_without_gpu_or_with_none_the_cpu_part_is_built_alone(archs, tmp_path):
    nvcc = nvcc_at(tmp_path / "cuda")
    assert plan(archs, CUDACXX=nvcc) == setup_cuda.Plan((), None, "")
    assert plan(archs, CUDACXX=nvcc).local_version == ""


@pytest.mark.parametrize(
    ("archs", "expected", "local"),
    [
        ("90a,80", ("80", "90a"), "+cu130.sm80.sm90a"),
        ("120+PTX", ("120+PTX",), "+cu130.sm120.compute120"),
        ("all", setup_cuda.architectures.ALL, "+cu130.sm75.sm80.sm86.sm89.sm90a.sm100a.sm120.compute120"),
    ],
)
def test_lists_are_built_as_asked(archs, expected, local, tmp_path):
    planned = plan(archs, CUDACXX=nvcc_at(tmp_path / "cuda"))
    assert (planned.architectures, planned.local_version, planned.note) == (expected, local, "")
    assert planned.compiler.runtime == tmp_path / "cuda" / "lib" / "libcudart_static.a"


def test_all_is_what_the_compiler_knows(tmp_path):
    planned = plan("all", CUDACXX=nvcc_at(tmp_path / "cuda", "12.4", "70 75 80 86 89 90"))
    assert planned.architectures == ("75", "80", "86", "89", "90a")
    assert planned.note == "'all' without 100a, 120+PTX: nvcc from CUDA 12.4 does not support it"


@pytest.mark.parametrize("archs", ["", "fast", "80;sm_90"])
def test_an_invalid_list_is_refused_before_any_compiler_is_asked(archs):
    with pytest.raises(ValueError, match="QLORA_KERNELS_CUDA_ARCHS should be native, none, all or a list"):
        plan(archs)


# --------------------------------------------------------------------------------------------------------- compiler


def test_a_list_without_nvcc_says_what_to_install():
    with pytest.raises(
        ValueError, match=r"is '80;90a', and there is no nvcc .*; install .*pip install nvidia-cuda-nvcc"
    ):
        plan("80;90a")
    with pytest.raises(ValueError, match=r"is 'all', and there is no nvcc"):
        plan("all", CUDACXX="/no/such/nvcc")


def test_an_old_nvcc_and_an_architecture_it_does_not_know_are_sentences(tmp_path):
    old = nvcc_at(tmp_path / "old", "11.8")
    with pytest.raises(ValueError, match=rf"{old} is from CUDA 11\.8, and qlora_kernels needs CUDA 12\.0 or later"):
        plan("80", CUDACXX=old)
    some = nvcc_at(tmp_path / "some", "12.6", "75 80 90")
    with pytest.raises(
        ValueError, match=r"names 100a, 120\+PTX, which .* from CUDA 12\.6 does not support; leave it out"
    ):
        plan("80;100a;120+PTX", CUDACXX=some)
    # Families came with 12.9, after the architecture.
    with pytest.raises(ValueError, match=r"names 100f, which"):
        plan("100f", CUDACXX=nvcc_at(tmp_path / "family", "12.8"))


def test_an_nvcc_that_does_not_work_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"comes without the CUDA runtime: there is no libcudart_static\.a in"):
        plan("80", CUDACXX=nvcc_at(tmp_path / "bare", runtime=False))
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match=rf"{broken} is not a working nvcc"):
        plan("80", CUDACXX=broken)
    compiler = plan("80", CUDACXX=nvcc_at(tmp_path / "cuda")).compiler
    with pytest.raises(ValueError, match=r"cannot compile on this machine: nvcc fatal : no; install"):
        compiler.probe(None)


def test_nvcc_is_looked_for_from_the_nearest_to_the_farthest(tmp_path, monkeypatch):
    places = ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "PATH", "toolkit", "packages")
    nvccs = {name: nvcc_at(tmp_path / name) for name in places if name != "packages"}
    nvccs["packages"] = nvcc_at(tmp_path / "site-packages" / "nvidia" / "cu13")
    monkeypatch.setattr(setup_cuda, "TOOLKIT", tmp_path / "toolkit")
    monkeypatch.setattr(setup_cuda, "_site_packages", lambda environment: [tmp_path / "site-packages"])
    environment = {
        "CUDACXX": str(nvccs["CUDACXX"]),
        "CUDA_HOME": str(tmp_path / "CUDA_HOME"),
        "CUDA_PATH": str(tmp_path / "CUDA_PATH"),
        "PATH": f"/nowhere{os.pathsep}{tmp_path / 'PATH' / 'bin'}",
    }
    for name in places:
        assert setup_cuda.find_tool("nvcc", environment) == str(nvccs[name]), name
        environment.pop(name, None)
        if name == "toolkit":
            monkeypatch.setattr(setup_cuda, "TOOLKIT", tmp_path / "no-toolkit")
        nvccs[name].unlink()
    assert setup_cuda.find_tool("nvcc", environment) is None


def test_packages_are_found_from_an_isolated_build(tmp_path):
    """pip runs the environment's interpreter with its site-packages off sys.path; with build, VIRTUAL_ENV names it."""
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    code = (
        "import sys; sys.path[:] = [path for path in sys.path if 'site-packages' not in path]; import setup_cuda\n"
        f"print(*setup_cuda._site_packages({{'VIRTUAL_ENV': {str(tmp_path)!r}}}), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {str(packages), sysconfig.get_path("purelib")} <= {*done.stdout.splitlines()}


# -------------------------------------------------------------------------------------------------------------- GPUs


def test_native_is_the_gpus_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_cuda, "cards", lambda: [(7, 0), (8, 9), (9, 0), (10, 0)])
    planned = plan(None, CUDACXX=nvcc_at(tmp_path / "cuda"))
    assert planned.architectures == ("89", "90a", "100a")  # none for 7.0, which the kernels do not serve
    assert planned.note == ""


def test_a_gpu_that_nothing_can_be_built_for_leaves_a_note(tmp_path, monkeypatch):
    monkeypatch.setattr(setup_cuda, "cards", lambda: [(9, 0)])
    planned = plan()
    assert planned.architectures == ()
    assert re.match(
        r"found a GPU with architecture 90a, but only the CPU part is built, because there is no nvcc; install",
        planned.note,
    )
    planned = plan(CUDACXX=nvcc_at(tmp_path / "old", "11.8"))
    assert planned.architectures == ()
    assert "only the CPU part is built: " in planned.note
    assert "needs CUDA 12.0" in planned.note
    planned = plan(CUDACXX=nvcc_at(tmp_path / "few", "12.0", "75 80"))
    assert planned.architectures == ()
    assert "from CUDA 12.0 does not support that architecture" in planned.note


def test_without_a_driver_library_nvidia_smi_lists_the_gpus(tmp_path, monkeypatch):
    monkeypatch.undo()  # the real cards()
    monkeypatch.setattr(setup_cuda, "_cards_of_driver", lambda: None)
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\n[ "$1" = --query-gpu=compute_cap ] && printf "9.0\\n12.0\\n9.0\\n"\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert setup_cuda.cards() == [(9, 0), (12, 0)]
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert setup_cuda.cards() == []


# -------------------------------------------------------------------------------------------------------- setup.py


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    for needed in ("setuptools", "pybind11"):
        pytest.importorskip(needed)
    env = {key: value for key, value in os.environ.items() if key != "QLORA_KERNELS_WHEEL"} | environment
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_setup_py_stops_with_the_sentence_alone():
    done = setup_py("build_ext", QLORA_KERNELS_CUDA_ARCHS="80;hopper")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "QLORA_KERNELS_CUDA_ARCHS should be native, none, all or a list such as '80;90a;120+PTX', and 'hopper' is not "
        "a CUDA architecture\n"
    )


def test_setup_py_gives_the_version_of_what_it_would_build(tmp_path):
    nvcc = str(nvcc_at(tmp_path / "cuda"))
    done = setup_py("--version", QLORA_KERNELS_CUDA_ARCHS="80;120+PTX", CUDACXX=nvcc)
    assert done.stdout.strip() == f"{BASE}+cu130.sm80.sm120.compute120", done.stderr
    done = setup_py("--version", QLORA_KERNELS_CUDA_ARCHS="none", CUDACXX=nvcc)
    assert done.stdout.strip() == BASE, done.stderr
    # The sources are the same for all.


def test_a_source_distribution_needs_no_compiler_and_has_every_source(tmp_path):
    environment = {"QLORA_KERNELS_CUDA_ARCHS": "80", "CUDACXX": "/no/such/nvcc"}
    assert "there is no nvcc" in setup_py("bdist_wheel", "--help", **environment).stderr
    done = setup_py("sdist", "--dist-dir", str(tmp_path), **environment)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"qlora_kernels-{BASE}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files", "csrc"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {"setup_cuda.py", "csrc/CMakeLists.txt", "csrc/cuda/quantize/quantize.cu", *tracked} <= names


def test_setup_py_asks_the_driver(tmp_path):
    folder = str(cuda_wheel.fake_driver(tmp_path))
    nvcc = str(nvcc_at(tmp_path / "cuda"))
    environment = {"QLORA_KERNELS_CUDA_ARCHS": "native", "LD_LIBRARY_PATH": folder}
    done = setup_py("--version", CUDACXX=nvcc, **environment)
    assert (done.stdout.strip(), done.stderr) == (f"{BASE}+cu130.sm90a", "")
    done = setup_py("--version", CUDACXX="/no/such/nvcc", **environment)
    assert (done.stdout.strip(), done.stderr) == (BASE, "")
    # The build prints the note, once. Without a C++ compiler the build ends after that.
    done = setup_py("build_ext", CUDACXX="/no/such/nvcc", CXX="/no/such/c++", **environment)
    said = [line for line in done.stderr.splitlines() if "nvcc" in line]
    assert len(said) == 1, done.stderr
    assert said[0].startswith("qlora_kernels: found a GPU with architecture 90a, but only the CPU part is built")


# ----------------------------------------------------------------------------------------------------------- CMake


def test_ccache_is_used_where_it_is_installed(tmp_path):
    """For C++ and for CUDA, whose compiler here is a fake that writes nothing."""
    pybind11 = pytest.importorskip("pybind11")
    tools, log, build = tmp_path / "tools", tmp_path / "log", tmp_path / "build"
    tools.mkdir()
    (tools / "ccache").write_text(f'#!/bin/sh\necho "$@" >>{log}\nexec "$@"\n')
    (tools / "ccache").chmod(0o755)
    nvcc = nvcc_at(tmp_path / "cuda")
    nvcc.write_text(nvcc.read_text().replace("echo 'nvcc fatal : no' >&2; exit 1", "exit 0"))
    env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CUDACXX": str(nvcc)}
    source = "dynamic_map.cpp"
    for command in (
        [
            *("cmake", "-S", ROOT / "csrc", "-B", build, "-G", "Ninja", "-DQLK_CUDA_ARCHS=80;90a"),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        ],
        # One of the target's C++ files; the CUDA files come first.
        ["cmake", "--build", build, "--target", f"CMakeFiles/_C.dir/{source}.o"],
    ):
        done = subprocess.run([*map(str, command)], env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    calls = [line.split() for line in log.read_text().splitlines()]
    cuda = {word for call in calls if call[0] == str(nvcc) for word in call if word.endswith(".cu")}
    assert cuda == {str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cuda").rglob("*.cu")}
    [cpp] = [call for call in calls if call[-1].endswith(f"/{source}")]
    assert cpp[0] != str(nvcc)
    assert (build / "CMakeFiles" / "_C.dir" / f"{source}.o").stat().st_size > 0

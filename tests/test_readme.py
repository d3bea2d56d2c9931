"""README and docs/: every Python block runs, and what the pages name is there."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import tempfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
TOP = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]
PAGES = [*TOP, ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BY_NAME = {str(path.relative_to(ROOT)): path for path in PAGES}

#: A fenced block: an optional comment with its stand-in, its language, its text.
FENCE = re.compile(r"^(?:<!-- stand-in: ([^>]+) -->\n)?```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Blocks that hold nothing to run, or what something else makes: Sphinx's directives, output, commands.
NOT_RUN = ("text", "console", "yaml", "{toctree}", "{include}", "{eval-rst}", "{csv-table}", "{command-help}")

# --------------------------------------------------------------------------------------------------------- blocks


@contextlib.contextmanager
def tiny_llama():
    """from_pretrained gives a Llama of two small layers, whatever model it is asked for."""
    transformers = pytest.importorskip("transformers")
    from small.llama import llama

    def from_pretrained(name, dtype=None, **options):
        return llama().to(dtype) if dtype else llama()

    with mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained):
        yield str


@contextlib.contextmanager
def a_4_bit_folder():
    """The folder llama-4bit, as the command before the block leaves it."""
    pytest.importorskip("transformers")
    from small.llama import llama

    from qlora_kernels.cli.main import main

    llama().save_pretrained("Llama-3.1-8B")
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["quantize", "Llama-3.1-8B", "llama-4bit", "--quiet"]) == 0
    yield str


@contextlib.contextmanager
def tiny_llama_in_4_bits():
    """The same from a folder, so that from_pretrained quantizes it with bitsandbytes."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    from small.llama import llama

    real = transformers.AutoModelForCausalLM.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)

        def from_pretrained(name, **options):
            return real(folder, **options)

        with mock.patch.object(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained):
            yield str


@contextlib.contextmanager
def tiny_folder():
    """The same Llama in a folder, under the name that is asked for."""
    pytest.importorskip("transformers")
    from small.llama import llama

    llama().save_pretrained("meta-llama/Llama-3.1-8B")
    yield str


@contextlib.contextmanager
def the_cpu():
    yield lambda code: code.replace('"cuda"', '"cpu"')


@contextlib.contextmanager
def as_it_stands():
    yield str


#: By the comment above a block that would need a download or a card.
STAND_INS = {
    None: as_it_stands,
    "a tiny Llama for the download": tiny_llama,
    "a 4-bit folder of a tiny Llama": a_4_bit_folder,
    "a tiny Llama in 4 bits for the download": tiny_llama_in_4_bits,
    "a tiny Llama's folder for the download": tiny_folder,
    "the CPU for a CUDA device": the_cpu,
}


@pytest.mark.parametrize("name", [name for name, path in BY_NAME.items() if "```python\n" in path.read_text()])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    """One after the other, as a reader would; and a text block right after one is what it prints."""
    monkeypatch.chdir(tmp_path)
    text = BY_NAME[name].read_text()
    names: dict = {}
    blocks = list(FENCE.finditer(text))
    for block, following in zip(blocks, [*blocks[1:], None]):
        stand_in, language, code = block.groups()
        if language != "python":
            continue
        first_line = text[: block.start(3)].count("\n")
        said = io.StringIO()
        with STAND_INS[stand_in]() as changed, contextlib.redirect_stdout(said):
            # Line numbers in a traceback are the page's.
            exec(compile("\n" * first_line + changed(code), str(BY_NAME[name]), "exec"), names)
        if following and following[2] == "text" and not text[block.end() : following.start()].strip():
            assert said.getvalue() == following[3]


@pytest.mark.parametrize("name", BY_NAME)
def test_no_block_is_passed_over(name):
    """Each has a language that is known here; Python is run; and a stand-in stands above Python."""
    text = BY_NAME[name].read_text()
    blocks = list(FENCE.finditer(text))
    assert len(re.findall(r"^\s*(?:```|~~~|:::)", text, re.MULTILINE)) == 2 * len(blocks)
    assert text.count("<!-- stand-in:") == sum(block[1] is not None for block in blocks)
    for stand_in, language, code in (block.groups() for block in blocks):
        assert stand_in in STAND_INS
        if language != "python":
            assert language.split(" ")[0] in NOT_RUN, language
            assert stand_in is None
        assert "import qlora_kernels" not in code or language == "python"


def test_the_blocks_are_found():
    counts = {
        name: sum(block[2] == "python" for block in FENCE.finditer(path.read_text())) for name, path in BY_NAME.items()
    }
    assert counts["README.md"] == 1
    assert counts["docs/quickstart.md"] >= 5
    assert sum(counts.values()) >= 18


# --------------------------------------------------------------------------------------------------------- README


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 200


def test_first_example_has_ten_lines_or_so():
    block = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    statements = [line for line in block.splitlines() if line and not line.startswith(("import ", "from "))]
    assert len(statements) <= 10


def test_two_commands_stand_first():
    section = README.read_text().split("\n## ")[1]
    assert section.startswith("Two commands\n")
    commands = [line.strip() for line in section.splitlines() if line.startswith("    ")]
    assert commands == ["pip install -e '.[test]'", "pytest"]


def test_readme_says_once_that_no_card_has_run_it():
    text = README.read_text()
    assert text.count("No GPU has run the CUDA kernels yet.") == 1
    assert text.index("No GPU has run") < text.index("\n## ")
    assert len(re.findall(r"\bhas run\b|\bseen to run\b|no card has", text)) == 1


# ---------------------------------------------------------------------------------------------------------- facts


def test_the_measured_run_is_that_of_the_file():
    pytest.importorskip("transformers")
    from qlora_kernels.finetune.results import report

    text = (ROOT / "docs" / "fine-tuning.md").read_text()
    section = text.split("\n## A run, measured\n")[1].split("\n## ")[0]
    measured = json.loads((ROOT / "bench" / "results" / "finetune-compare-cpu.json").read_text())
    header, *rows = ("| " + " | ".join(cells) + " |" for cells in report.cells(measured["results"], measured["size"]))
    assert len(rows) == 5
    assert [line for line in section.splitlines() if line.startswith("| ")] == [header, *rows]
    assert report.recovery(measured["results"]) == measured["recovery"] >= 0.95
    [sentence] = [line for line in report.conclusions(measured["results"], None, "") if "recovers" in line]
    results, options, machine = measured["results"], measured["options"], measured["machine"]
    flat = " ".join(section.split())
    for phrase in (
        sentence,
        f"on {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, ",
        f"kernels for {machine['kernels']}, torch {measured['versions']['torch']} ",
        f"{results['qlora']['steps']} steps of {options['batch_size']} sequences, rank {options['rank']}.",
        f"Python and its libraries are {measured['library_memory'] / 2**20:.0f} MiB",
        f"{results['full']['trainable'] / 1e6:.1f} million parameters",
    ):
        assert phrase in flat, phrase
    assert len({result["steps"] for result in results.values() if "steps" in result}) == 1


def test_the_levels_in_formats_are_the_code_s():
    from qlora_kernels import reference

    rows = re.findall(r"^\| (\d+) \| (\S+) \| (\d+) \| (\S+) \|$", (ROOT / "docs/design/formats.md").read_text(), re.M)
    shown = {int(code): float(level) for row in rows for code, level in (row[:2], row[2:])}
    assert shown == dict(enumerate(reference.levels().tolist()))


def test_formats_on_disk_have_their_names_in_the_code():
    text = (ROOT / "docs/design/formats.md").read_text() + (ROOT / "CHANGELOG.md").read_text()
    code = "".join(path.read_text() for path in (ROOT / "qlora_kernels").rglob("*.py"))
    formats = set(re.findall(r"qlora_kernels\.(?:nf4|optim/\d+|finetune/\d+)(?=`)", text))
    assert len(formats) == 3
    for name in formats:
        assert f'"{name}"' in code, name


def test_environment_variables_are_documented_and_exist():
    variable = re.compile(r"\bQLORA_KERNELS_[A-Z_]+[A-Z]\b")
    suffixes = (".py", ".h", ".cpp", ".cu", ".cuh")
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes]
    sources += [*(ROOT / "qlora_kernels").rglob("*.py"), ROOT / "setup.py", ROOT / "setup_cuda.py"]
    read = {name for path in sources for name in variable.findall(path.read_text())}
    beside = {name for folder in ("tests", "bench") for path in (ROOT / folder).rglob("*.py") for name in
              variable.findall(path.read_text())}  # fmt: skip
    table = set(variable.findall((ROOT / "docs" / "install.md").read_text()))
    assert read <= table
    for path in PAGES:
        assert set(variable.findall(path.read_text())) <= read | beside, path


# ---------------------------------------------------------------------------------------------------------- names


def links() -> list[tuple[str, str]]:
    link = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
    return sorted({(name, target) for name, path in BY_NAME.items() for target in link.findall(path.read_text())})


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize(("name", "target"), links())
def test_links_lead_somewhere(name, target):
    file, _, heading = target.partition("#")
    path = (BY_NAME[name].parent / file) if file else BY_NAME[name]
    assert path.exists()
    if heading:
        assert heading in map(slug, re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE))


def test_named_files_exist():
    """Paths in backticks, and modules that are run. In a rule for something new, "foo" stands for its name."""
    missing = []
    for name, path in BY_NAME.items():
        text = path.read_text()
        for file in re.findall(r"`((?:csrc|qlora_kernels|tests|bench|docs|examples)/[\w./]*)`", text):
            if "foo" not in file and not (ROOT / file).exists():
                missing.append(f"{name}: {file}")
        for module in re.findall(r"python -m ((?:bench|qlora_kernels)[\w.]*)", text):
            place = ROOT.joinpath(*module.rstrip(".").split("."))
            if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
                missing.append(f"{name}: python -m {module}")
    assert not missing, "\n".join(missing)


def test_commands_have_the_options_that_pages_show():
    from qlora_kernels.cli.main import main

    said = {}

    def help_of(command: str) -> str:
        if command not in said:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
                main([command, "--help"])
            said[command] = out.getvalue()
        return said[command]

    shown = 0
    for name, path in BY_NAME.items():
        for command, rest in re.findall(r"qlora-kernels ([a-z]+)((?: [^\n`#|]+)?)", path.read_text()):
            if command not in ("finetune", "quantize", "bench", "info"):
                continue
            for option in re.findall(r"(?<!\S)--[a-z][\w-]*", rest):
                assert option in re.findall(r"--[a-z][\w-]*", help_of(command)), f"{name}: {command} {option}"
                shown += 1
    assert shown >= 12


def documented() -> list[str]:
    """Names that the reference has a directive for."""
    pages = (path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    directive = re.compile(r"^\.\. (?:autofunction|autoclass|py:data|py:module):: qlora_kernels\.(\S+)$", re.M)
    return [name for text in pages for name in directive.findall(text)]


def test_the_reference_has_every_public_name_once():
    import qlora_kernels

    names = [name for name in documented() if not name.startswith("reference.")]
    assert sorted(names) == sorted({*qlora_kernels.__all__, "reference"})
    for name in documented():
        value = qlora_kernels
        for attribute in name.split("."):
            value = getattr(value, attribute)
        assert isinstance(value, str) or value.__doc__, name


# ---------------------------------------------------------------------------------------------------------- build


def extension(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "_extensions" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_out_of_the_pages(tmp_path):
    pytest.importorskip("sphinx")
    pages = tmp_path / "docs"
    for folder in (pages, tmp_path / "examples"):
        folder.mkdir()
    for file in (pages / "a.md", tmp_path / "b.md", tmp_path / "c.json"):
        file.touch()
    text = "[a](a.md) [b](../b.md) [c](../c.json) [examples/](../examples) [x](https://example.org/b.md) ![b](../b.md)"
    assert extension("repository_links").rewrite(text, pages, pages) == (
        "[a](a.md) {download}`b <../b.md>` [c](../c.json) `examples/` [x](https://example.org/b.md) ![b](../b.md)"
    )


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    for module in ("myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(module)
    import subprocess
    import sys

    import qlora_kernels

    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", tmp_path / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    from sphinx.util.inventory import InventoryFile

    with open(tmp_path / "html" / "objects.inv", "rb") as file:
        inventory = InventoryFile.load(file, "", lambda base, path: path)
    indexed = {name for kind in inventory if kind.startswith("py:") for name in inventory[kind]}
    assert {f"qlora_kernels.{name}" for name in qlora_kernels.__all__} <= indexed
    assert {f"qlora_kernels.{name}" for name in ("QLinear.merge", "PagedAdamW.save", "NF4Weight.dequantize")} <= indexed
    pages = {
        path.relative_to(tmp_path / "html").with_suffix("").as_posix() for path in (tmp_path / "html").rglob("*.html")
    }
    assert {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix() for path in (ROOT / "docs").rglob("*.md")
    } <= pages
    help_page = (tmp_path / "html" / "command-line.html").read_text()
    assert all(option in help_page for option in ("--page-file", "--max-shard-size", "--compare", "--dispatch"))

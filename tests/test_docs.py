"""The documentation: every block of code runs, every command line parses, and no public name is left out."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser

import trainloop
from trainloop.__main__ import _make_parser
from trainloop.checkpoint import RetentionPolicy
from trainloop.commands.prove import split_launch_options

from .launching import REPOSITORY, environment

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "examples" / "README.md", *sorted(DOCS.rglob("*.md"))]
MODULES = ["trainloop", "trainloop.account", "trainloop.checkpoint", "trainloop.data", "trainloop.testing"]
PROMPTS = ("$ ", "# ")
OWN_PROGRAM = {"README.md", "index.md"}
"""Pages that need nothing of another; the rest go on from the program of index.md, as that page says."""
OWN_TEST = DOCS / "migrating.md"  # test_migrating_docs.py


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str | None
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text()
    fences = re.finditer(r'^```(\w*)(?: title="(.*?)")?\n(.*?)^```$', text, re.M | re.S)
    return [Block(m[1], m[2], m[3], text.count("\n", 0, m.start()) + 2) for m in fences]


def name_of(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def run_page(page: Path, namespace: dict[str, Any]) -> None:
    """Run a page's Python blocks one after the other; one with a title is a file, and a process, of its own."""
    for block in blocks(page):
        if block.language == "python" and block.title is not None:
            Path(block.title).write_text(block.code)
            subprocess.run([sys.executable, block.title], check=True, env=environment(), timeout=240)
        elif block.language == "python":
            source = "\n" * (block.line - 1) + block.code  # so that a traceback names the line of the page
            exec(compile(source, str(page), "exec"), namespace)


# ---------------------------------------------------------------------- what is shown works


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text() and p != OWN_TEST], ids=name_of)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From top to bottom, in one process and an empty folder, without a warning."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)  # what a class of a page belongs to
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny models: on a busy machine threads wait for one another more than they work
    try:
        if page.name not in OWN_PROGRAM:
            run_page(DOCS / "index.md", vars(module))
        run_page(page, vars(module))
    finally:
        torch.set_num_threads(num_threads)
        torch.use_deterministic_algorithms(False)


def commands(page: Path) -> Iterator[list[str]]:
    """The command lines in a page's shell blocks, in its table cells, and behind a prompt in its examples of output."""
    for block in blocks(page):
        lines = block.code.replace("\\\n", " ").splitlines()
        if block.language == "sh":
            yield from (shlex.split(line, comments=True) for line in lines if line.strip())
        elif block.language == "text":
            yield from (shlex.split(line[2:]) for line in lines if line.startswith("$ "))
    for row in re.findall(r"^\|.*$", page.read_text(), re.M):
        for cell in re.findall(r"`((?:\w+=\w+ )?(?:accelerate launch|python|make) [^`…|]*)`", row):
            yield shlex.split(cell)


def launch_options() -> set[str]:
    return {option for action in launch_command_parser()._actions for option in action.option_strings}


def check_script(script: str, arguments: list[str]) -> None:
    """A script of ours exists and has the options."""
    if script == "train.py":  # the reader's
        return
    text = (REPOSITORY / script).read_text()
    assert [a for a in arguments if a.startswith("--") and f'"{a}"' not in text] == []


def check_command(words: list[str]) -> None:
    """Raise unless the command exists and takes these options."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    program, rest = words[0], words[1:]
    if program == "pip":
        extras = re.findall(r"\[(.*?)\]", " ".join(rest))
        pyproject = (REPOSITORY / "pyproject.toml").read_text()
        assert [extra for extra in extras if not re.search(rf"^{extra} = \[", pyproject, re.M)] == []
    elif program == "make":
        assert re.search(rf"^{rest[0]}:", (REPOSITORY / "Makefile").read_text(), re.M)
    elif program == "accelerate":
        options = launch_command_parser().parse_args(rest[1:])
        assert rest[0] == "launch"
        if options.module:
            assert options.training_script == "trainloop"
            _make_parser().parse_args(options.training_script_args)
            return
        check_script(options.training_script, options.training_script_args)
    elif program == "trainloop" or rest[:2] == ["-m", "trainloop"]:
        rest = ["-m", "trainloop", *rest] if program == "trainloop" else rest
        is_only_named = len(rest) <= 4 and rest[2] == "checkpoints"  # in prose
        own, launch_args = split_launch_options([*rest[2:], "DIR"] if is_only_named else rest[2:])
        _make_parser().parse_args(own)
        launch_command_parser().parse_args([*launch_args, "train.py"])
    elif program == "python":
        check_script(rest[0], rest[1:])
    else:
        assert program in ("cd", "git"), f"no check knows {program}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_commands_of_a_page_are_right(page: Path) -> None:
    """Programs, scripts, options, extras and make's targets exist; longer scripts and YAML are valid."""
    for words in commands(page):
        try:
            check_command(words)
        except SystemExit as ex:
            raise AssertionError(f"{shlex.join(words)} is refused") from ex
    for block in blocks(page):
        assert block.language in ("python", "sh", "bash", "yaml", "text"), f"{page}:{block.line} has another language"
        if block.language == "yaml":
            assert yaml.safe_load(block.code)
        elif block.language == "bash":
            subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
            used = set(re.findall(r"(?<=\s)--\w+(?=[ =\n])", block.code.partition("accelerate launch")[2]))
            assert used - launch_options() <= {"--workspace"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_names_are_there(page: Path) -> None:
    """Links lead to a file of the repository, and paths like `tests/test_x.py` are those of one."""
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
    paths = re.findall(r"`((?:tests|examples|benchmarks|trainloop|integrations)/[\w./]*)`", text)
    assert [path for path in paths if not (REPOSITORY / path).exists()] == []


# ---------------------------------------------------------------------- nothing public is left out


def public() -> dict[str, Any]:
    """Each public name with its object: "trainloop.BestK"."""
    modules = [importlib.import_module(module) for module in MODULES]
    return {f"{module.__name__}.{name}": getattr(module, name) for module in modules for name in module.__all__}


def test_every_public_name_is_in_the_reference() -> None:
    """The reference shows each name of each `__all__` once, and nothing else."""
    shown = [
        name for page in DOCS.rglob("reference/*.md") for name in re.findall(r"^::: (\S+)$", page.read_text(), re.M)
    ]
    assert sorted(shown) == sorted(public())


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs.yml lists each page once."""
    listed = re.findall(r"(\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.M)
    there = [str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)]
    assert sorted(listed) == sorted(there)


def test_the_table_of_contents_has_every_how_to() -> None:
    """how_to/index.md leads to each of its neighbours."""
    linked = re.findall(r"\]\((\w+\.md)\)", (DOCS / "how_to" / "index.md").read_text())
    assert sorted({*linked, "index.md"}) == sorted(page.name for page in (DOCS / "how_to").iterdir())


def test_the_readme_and_the_changelog_know_every_public_name() -> None:
    """README's table of hooks has each hook; CHANGELOG.md names everything that can be imported."""
    names = {name: value for name, value in public().items() if name.count(".") == 1}
    hooks = {
        name.split(".")[1] for name, v in names.items() if isinstance(v, type) and issubclass(v, trainloop.BaseHook)
    }
    table = re.findall(r"^\| `(\w+Hook)`", (REPOSITORY / "README.md").read_text(), re.M)
    assert sorted(table) == sorted(hooks)
    changelog = (REPOSITORY / "CHANGELOG.md").read_text()
    assert [name for name in names if not re.search(rf"`{re.escape(name)}\b", changelog)] == []
    dead = [name for name in re.findall(r"`(trainloop(?:\.\w+)+)", changelog) if not hasattr_path(name)]
    assert dead == []


def hasattr_path(name: str) -> bool:
    """Whether a dotted name leads to something."""
    value: Any = trainloop
    for part in name.split(".")[1:]:
        if not hasattr(value, part):
            try:
                importlib.import_module(f"{value.__name__}.{part}")
            except (ImportError, AttributeError):
                return False
        value = getattr(value, part)
    return True


# ---------------------------------------------------------------------- docstrings


def described(docstring: str) -> set[str]:
    """The arguments that a docstring's `Args:` describes."""
    sections = re.findall(r"^(?:Args|Attributes):\n((?: +.*\n|\n)*)", docstring + "\n", re.M)
    return {name for section in sections for name in re.findall(r"^ {4}\*{0,2}(\w+): \S", section, re.M)}


def arguments(function: Any) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self", "cls"}


def members(cls: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties that a class has of its own, as plain functions."""
    for name, value in vars(cls).items():
        inner = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(inner):
            yield name, inner


def missing_in(cls: type) -> Iterator[str]:
    """What the docstrings of a class and of its members leave out."""
    own = described(inspect.getdoc(cls) or "") | described(inspect.getdoc(cls.__init__) or "")
    bases = [*cls.__mro__, *([RetentionPolicy] if issubclass(cls, RetentionPolicy) else [])]
    if dataclasses.is_dataclass(cls):
        sources = "".join(inspect.getsource(base) for base in bases if dataclasses.is_dataclass(base))
        for field in dataclasses.fields(cls):
            is_told = re.search(rf'^    {field.name}:.*\n    """', sources, re.M) or f"`{field.name}`" in str(
                cls.__doc__
            )
            if not is_told and field.name not in TOLD_BY_THEIR_NAME:
                yield field.name
    elif "__init__" in vars(cls) and not getattr(cls, "_is_protocol", False):
        yield from sorted(arguments(cls.__init__) - own)
    for name, function in members(cls):
        told = [inspect.getdoc(vars(base)[name]) or "" for base in bases if name in vars(base)]
        if not any(told):
            yield f"{name}: no docstring"
        told += [
            inspect.getdoc(getattr(cls, other)) or "" for text in told for other in re.findall(r"As `(\w+)`", text)
        ]
        named = {word for text in told for word in re.findall(r"\w+", text)}  # a sentence may say it as well as `Args:`
        yield from (f"{name}({argument})" for argument in sorted(arguments(function) - named - {"trainer"}))


TOLD_BY_THEIR_NAME = {"step", "steps", "run_id", "world_size", "loss", "grad_norm", "versions"}


@pytest.mark.parametrize("name", public())
def test_every_public_name_says_what_it_is_and_takes(name: str) -> None:
    """A docstring; under its `Args:` each argument of a function or constructor; each field; a method names its own."""
    value = public()[name]
    if isinstance(value, type):
        assert value.__doc__
        assert list(missing_in(value)) == []
    elif inspect.isfunction(value):
        assert value.__doc__
        assert arguments(value) - described(inspect.getdoc(value) or "") == set()
    else:  # a constant or an alias: the text below it
        assert re.search(rf'^{name.split(".")[-1]}\b[^\n]*= (?:.*?\n)*?"""', source_of(name), re.M)


def source_of(name: str) -> str:
    """The source of the module that defines a constant."""
    package = importlib.import_module(name.rpartition(".")[0])
    last = name.split(".")[-1]
    files = Path(inspect.getfile(package)).parent.glob("*.py")
    return next(text for text in (file.read_text() for file in files) if re.search(rf"^{last}\b.*=", text, re.M))


@pytest.mark.parametrize("event", [name for name, _ in members(trainloop.BaseHook)])
def test_every_event_says_which_ranks_it_happens_on(event: str) -> None:
    """And so whether collectives are allowed."""
    assert "rank" in (inspect.getdoc(getattr(trainloop.BaseHook, event)) or "")

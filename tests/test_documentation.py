"""The documentation: all pages are in the navigation, links resolve, lines run, references are whole."""

import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY
from PIL import Image

sys.path.insert(0, str(ROOT / "docs"))
import reference

from lediflow.training.config import all_keys, config_class

DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES |= {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")}
MADE = reference.pages()


class Plain(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags name Python objects, as plain values."""


Plain.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def navigation(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else navigation(value)


def slug(heading):
    """A heading's anchor, as Python-Markdown makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    text = re.sub(r"[^\w\s-]", "", text.encode("ascii", "ignore").decode()).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(text):
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)}


def test_every_page_is_in_the_navigation_once():
    listed = list(navigation(yaml.load((ROOT / "mkdocs.yml").read_text(), Plain)["nav"]))
    written = [page for page in PAGES if not page.isupper() and page not in ("README.md", "CONTRIBUTING.md")]
    assert sorted(listed) == sorted([*written, *MADE])


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_resolve(page):
    here = ROOT if page in ("README.md", "CONTRIBUTING.md") else (DOCS / page).parent
    text = re.sub(r"```.*?```|`[^`\n]*`", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        path = (here / file).resolve() if file else None
        if path is not None and path.is_relative_to(DOCS) and str(path.relative_to(DOCS)) in MADE:
            continue
        assert path is None or path.is_file(), target
        if anchor:
            known = PAGES[page] if path is None else path.read_text(encoding="utf-8")
            assert anchor in anchors(known), target


def test_the_references_tell_every_command_setting_and_name():
    import lediflow
    from lediflow.cli.app import app

    names = [c.name or c.callback.__name__ for c in app.registered_commands]
    for name in names:
        assert f"## lediflow {name}\n" in MADE["reference/command-line.md"]
    assert "`--latent-guidance`" in MADE["reference/command-line.md"]
    keys = all_keys(config_class())
    for key in (k for k in keys if not any(other.startswith(f"{k}.") for other in keys)):
        whole = (key, key.rpartition(".")[0])  # a list of sections is one setting: training.ema
        assert any(f"| `{told}` |" in MADE["reference/settings.md"] for told in whole), key
    for name in lediflow.__all__:
        assert f".{name}\n" in MADE["reference/python.md"]
    assert "](../architecture.md#to-add-something)" in MADE["project/contributing.md"]
    assert f"]({reference.REPOSITORY}/LICENSE)" in MADE["project/contributing.md"]


def test_links_that_lead_out_are_listed():
    found = reference.external_links()
    assert "docs/index.md" in found["https://arxiv.org/abs/2505.20723"]


# The lines of the pages, as they stand

QUICK = [s for s in TINY if s.startswith("training") and "stages" not in s] + [
    *(
        f"training.{stage}.{key}=2"
        for stage in ("auxiliary", "flow", "weak_flow", "sampler", "meanflow", "sampler_meanflow")
        for key in ("steps", "batch_size")
    ),
    *("auxiliary.widths=[32,32,32]", "flow.widths=[64,64]", "sampler.widths=[64]"),
    "training.meanflow.autoguidance=null",  # or the search for its strength takes a minute
]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], flags=re.DOTALL)


def commands(page):
    lines = [shlex.split(line, comments=True) for line in "".join(blocks(page, "bash")).splitlines()]
    return [line[1:] for line in lines if line and line[0] == "lediflow"]


def test_lines_of_the_pages_to_start_with(tmp_path, monkeypatch, lediflow):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (80, 70 + i), (40 * i, 120, 200 - 30 * i)).save(tmp_path / "photos" / f"{i}.jpg")
    for page in ("start/install.md", "start/choose-a-preset.md", "start/own-photos.md"):
        assert commands(page)
        for command in commands(page):
            extra = [part for s in QUICK for part in ("--set", s)] if command[0] == "train" else []
            done = lediflow(*command, *extra)
            assert done.returncode == 0, (command, done.stderr)
    (code,) = blocks("start/own-photos.md", "python")
    exec(compile(code, "own-photos.md", "exec"), {})
    assert Image.open("picture.png").size == (64, 64)


def test_lines_of_sharing(tmp_path, monkeypatch, tiny_mean_run, lediflow, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("flowers", "demo"):
        shutil.copytree(tiny_mean_run, tmp_path / "runs" / name)
    (look,) = [line for line in commands("sharing.md") if "--output" in line and line[0] == "push"]
    assert lediflow(*look).returncode == 0
    assert (tmp_path / "look" / "README.md").is_file()
    parts, session = blocks("sharing.md", "python")
    exec(compile(parts, "sharing.md", "exec"), {})
    assert capsys.readouterr().out == "VelocityTransformer\n"
    # the graph is made in tests/pipelines/test_export.py; here: what export.json tells is enough to feed it
    from lediflow.pipelines.export import OneEvaluation, describe_inputs
    from lediflow.pipelines.load import load_pipeline

    inputs = OneEvaluation(load_pipeline(tiny_mean_run)).inputs
    (tmp_path / "flowers-onnx").mkdir()
    (tmp_path / "flowers-onnx" / "export.json").write_text(json.dumps({"inputs": describe_inputs(inputs)}))

    class Session:
        def __init__(self, path):
            assert path == "flowers-onnx/model.onnx"

        def run(self, outputs, feed):
            assert {name: value.shape for name, value in feed.items()} == {
                i.name: (4, *i.shape) for i in inputs
            }
            return [np.zeros(1)]

    monkeypatch.setitem(sys.modules, "onnxruntime", type("onnxruntime", (), {"InferenceSession": Session}))
    exec(compile(session, "sharing.md", "exec"), {})

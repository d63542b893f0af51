"""Push a run to a Hub that is faked at the level of HTTP, and load it from there by its id."""

import base64
import json
import re
import shutil

import huggingface_hub
import pytest
import torch
from conftest import refused, tiny_codec_settings
from diffusers import AutoModel, DiffusionPipeline
from PIL import Image

from lediflow.networks.velocity import VelocityTransformer
from lediflow.pipelines.lediflow import LeDiFlowPipeline
from lediflow.pipelines.load import load_pipeline
from lediflow.training.config import load_config
from lediflow.training.run import train

try:  # what huggingface_hub speaks through depends on its version
    import httpx2 as httpx
except ImportError:
    import httpx

COMMIT = "c" * 40
ID = "somebody/digits"


class FakeHub:
    """The Hub's answers to the requests that an upload and a download make; files lie in memory."""

    def __init__(self):
        self.repositories, self.branches, self.asked, self.refuse = {}, {}, [], False

    def __call__(self, request):
        path = request.url.path
        self.asked.append(f"{request.method} {path}")
        if self.refuse:
            return httpx.Response(401, json={"error": "Invalid username or password."})
        if path == "/api/repos/create":
            asked = json.loads(request.content)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories[name] = asked.get("private", asked.get("visibility") == "private")
            self.branches[name] = {"main": {}}
            return httpx.Response(200, json={"url": f"https://huggingface.co/{name}", "name": name})
        if path == "/api/validate-yaml":
            return httpx.Response(200, json={"errors": [], "warnings": []})
        name, action, rest = self._parts(path)
        if action == "branch":
            self.branches[name][rest] = {}
            return httpx.Response(200)
        if action == "preupload":
            files = [file["path"] for file in json.loads(request.content)["files"]]
            return httpx.Response(
                200,
                json={"files": [{"path": f, "uploadMode": "regular", "shouldIgnore": False} for f in files]},
            )
        if action == "commit":
            for line in request.content.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.branches[name][rest][entry["value"]["path"]] = content
            url = f"https://huggingface.co/{name}/commit/{COMMIT}"
            return httpx.Response(
                200, json={"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}
            )
        if action == "revision" and rest in {*self.branches.get(name, {}), COMMIT}:
            siblings = [{"rfilename": file} for file in self._files(name, rest)]
            return httpx.Response(200, json={"id": name, "sha": COMMIT, "siblings": siblings, "tags": []})
        if action == "tree":  # what a snapshot consists of
            files = self._files(name, rest)
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": f"{hash(content):x}"}
                for file, content in files.items()
            ]
            return httpx.Response(200, json=entries)
        if action == "resolve":
            revision, _, file = rest.partition("/")
            content = self._files(name, revision).get(file)
            if content is not None:
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hash(content):x}"'}
                if request.method == "HEAD":
                    return httpx.Response(200, headers={**headers, "Content-Length": str(len(content))})
                return httpx.Response(200, headers=headers, content=content)
        print("UNKNOWN", request.method, request.url)
        return httpx.Response(404, headers={"X-Error-Code": "EntryNotFound"}, json={"error": "not found"})

    @staticmethod
    def _parts(path):
        found = re.match(r"(?:/api/models)?/([\w-]+/[\w-]+)/(\w+)/?(.*)", path)
        return found.groups() if found else ("", "", "")

    def _files(self, name, revision):
        branches = self.branches.get(name, {})
        return branches.get(revision, next(iter([*branches.values()][-1:]), {}))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = FakeHub()
    # the Hub's client takes them from these, so that its own code, all of it, makes and reads the requests
    huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(hub)))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield hub
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def test_a_pushed_model_is_loaded_by_its_id(hub, tiny_mean_run, lediflow):
    pushed = lediflow("push", tiny_mean_run, ID, "--license", "cc-by-4.0", "--private", "--images", "4")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.splitlines()[-2:] == [
        f"https://huggingface.co/{ID}/commit/{COMMIT}",
        f"lediflow sample {ID} -n 16",
    ]
    assert hub.repositories == {ID: True}
    assert hub.asked.count(f"POST /api/models/{ID}/commit/main") == 1, "all in one commit"
    files = hub.branches[ID]["main"]
    assert {"README.md", "config.yaml", "samples.png", "model_index.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    card = files["README.md"].decode()
    assert "license: cc-by-4.0" in card and f'from_pretrained("{ID}")' in card
    assert "![images that it made, none picked out](samples.png)" in card
    wanted = load_pipeline(tiny_mean_run)(3, seed=1, output_type="pt").images
    files["flow/evil.py"] = b"raise SystemExit"
    files["flow/diffusion_pytorch_model.bin"] = b"a pickle"
    for loaded in (load_pipeline(ID), load_pipeline(f"{ID}@main"), LeDiFlowPipeline.from_pretrained(ID)):
        assert torch.equal(loaded(3, seed=1, output_type="pt").images, wanted)
    assert not [asked for asked in hub.asked if asked.endswith((".py", ".bin"))], "no code, no pickles"


def test_a_stage_goes_to_a_branch_of_its_own(hub, tiny_mean_run, lediflow):
    pushed = lediflow("push", tiny_mean_run / "flow", ID, "--revision", "plain", "--images", "0", "--json")
    assert json.loads(pushed.stdout)["revision"] == "plain"
    assert hub.branches[ID]["main"] == {} and "samples.png" not in hub.branches[ID]["plain"]
    loaded = load_pipeline(f"{ID}@plain")
    assert loaded(1).nfe == {"sampler": 8, "decoder": 1, "flow": 4}, "the unrefined one"


def test_what_the_hub_refuses_is_said(hub, tiny_mean_run, lediflow):
    hub.refuse = True
    assert refused(lediflow("push", tiny_mean_run, ID, "--images", "0"), "did not take", "hf auth login")
    asked = len(hub.asked)
    for name in ("digits", "a/b/c", "some body/digits"):
        assert refused(lediflow("push", tiny_mean_run, name), "is no name on the Hub")
    assert refused(lediflow("push", tiny_mean_run / "pipeline" / "flow", ID), "is no run folder")
    assert refused(lediflow("push", tiny_mean_run / "sampler", ID), "has no trained pipeline")
    assert len(hub.asked) == asked, "no name or folder of these was asked for"


def test_paths_of_this_machine_stay_here(hub, tiny_run, tmp_path, lediflow):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    config = (run / "config.yaml").read_text()
    private = tmp_path / "of-mine" / "photos"
    (run / "config.yaml").write_text(config.replace("train: digits", f"train: {private}"))
    (run / "table.md").write_text(f"| measured on {private} |\n\nand more\n")
    out = tmp_path / "look"
    assert lediflow("push", run, ID, "--output", out, "--images", "4").returncode == 0
    assert not hub.asked
    told = [path for path in out.rglob("*") if path.suffix in (".md", ".yaml", ".json")]
    assert len(told) == 6
    for path in told:
        assert str(tmp_path) not in path.read_text(), path
    assert "on `photos` at" in (out / "README.md").read_text()
    assert "| measured on photos |\n\nand more" in (out / "README.md").read_text()
    assert "train: photos" in (out / "config.yaml").read_text()
    with Image.open(out / "samples.png", formats=["PNG"]) as picture:
        assert picture.size == (2 * 64 + 6, 2 * 64 + 6)
    assert refused(lediflow("push", run, ID, "--output", out), "is there already")


def test_half_the_size(tiny_mean_run, tmp_path, lediflow):
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert lediflow("push", tiny_mean_run, ID, "--output", whole, "--images", "4").returncode == 0
    assert lediflow("push", tiny_mean_run, ID, "--output", half, "--images", "4", "--half").returncode == 0
    weights = "flow/diffusion_pytorch_model.safetensors"
    sizes = [(folder / weights).stat().st_size for folder in (whole, half)]
    assert sizes[1] < 0.6 * sizes[0]
    wanted, loaded = (load_pipeline(folder) for folder in (whole, half))
    assert loaded.flow.dtype == torch.float32
    assert torch.equal(loaded.auxiliary.z_std, wanted.auxiliary.z_std)
    made = loaded(2, seed=1, output_type="pt").images
    assert 0 < (made - wanted(2, seed=1, output_type="pt").images).abs().max() < 0.05


def test_a_local_codec_comes_along(hub, tiny_codec, tiny_latents, tmp_path, lediflow):
    out, config = tmp_path / "look", load_config("digits", tiny_codec_settings(tiny_codec, tiny_latents))
    run = train(config, tmp_path / "run", stages=["baseline"], device="cpu")
    pushed = lediflow("push", run / "baseline", ID, "--output", out, "--images", "1", "--half")
    assert pushed.returncode == 0, pushed.stderr
    codec, shared = load_pipeline(run / "baseline"), load_pipeline(out)
    codec.load_codec()
    weights = zip(codec.vae.parameters(), shared.vae.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights), "--half is of our networks, not of the codec"
    index = json.loads((out / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and (out / "vae" / "config.json").is_file()
    assert index["codec_space"]["codec"] == "tiny"
    assert load_pipeline(out)(1, output_type="pt").images.shape == (1, 3, 16, 16)


def test_what_diffusers_alone_can_load(tiny_run):
    """Every part, once its class is imported; the whole only by our class: diffusers knows its own alone."""
    folder = tiny_run / "pipeline"
    flow = AutoModel.from_pretrained(str(folder), subfolder="flow")
    assert type(flow) is VelocityTransformer
    ours = load_pipeline(tiny_run).flow
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), ours.parameters(), strict=True))
    with pytest.raises(AttributeError, match="LeDiFlowPipeline"):
        DiffusionPipeline.from_pretrained(folder)

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import shared
from PIL import Image

from lediflow.data.images import ImageData
from lediflow.errors import UserError
from lediflow.metrics import features as module
from lediflow.metrics.classifier import SmallClassifier
from lediflow.metrics.features import (
    ClassifierFeatures,
    InceptionFeatures,
    Preprocessing,
    TransformersFeatures,
    open_features,
    weights_digest,
)
from lediflow.metrics.kernels import CMMD
from lediflow.metrics.text import ClipScore

transformers = pytest.importorskip("transformers")

MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def _images(n=3, c=3, side=20, seed=0):
    return torch.rand(n, c, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _preprocessor(folder, **settings):
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"do_center_crop": True, "resample": 3, "image_mean": MEAN, "image_std": STD, **settings})
    )


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A CLIP of a few thousand weights, on disk as on the Hub, tokenizer included."""
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.CLIPConfig(
        text_config=sizes
        | {"vocab_size": 40, "max_position_embeddings": 8}
        | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=12,
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    letters = list("abcdefghijklmnopqr")
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    vocab = {word: i for i, word in enumerate(words)}
    transformers.CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    _preprocessor(folder, size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return folder


def test_preprocessing_is_pillows_bicubic_with_antialiasing():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50), dtype=np.uint8)
    settings = {"size": {"height": 21, "width": 21}, "resample": 3, "image_mean": MEAN, "image_std": STD}
    out = Preprocessing(settings, 224)(torch.from_numpy(pixels)[None, None] / 127.5 - 1)
    picture = Image.fromarray(pixels.astype(np.float32))
    expected = np.asarray(picture.resize((21, 21), Image.Resampling.BICUBIC))
    assert out.shape == (1, 3, 21, 21)
    for channel in range(3):
        found = out[0, channel] * STD[channel] + MEAN[channel]
        np.testing.assert_allclose(found * 255, expected, atol=0.01)


def test_preprocessing_reads_the_side_it_ends_with():
    crop = {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224}}
    assert Preprocessing(crop, 7).side == 224
    assert Preprocessing(crop | {"do_center_crop": False}, 7).side == 256
    assert Preprocessing({}, 7).side == 7
    raw = Preprocessing({"do_rescale": False, "do_normalize": False}, 4)(torch.ones(1, 3, 4, 4))
    assert (raw == 255).all()


def test_clip_gives_its_projected_embedding(clip_folder):
    network = open_features(str(clip_folder), "cpu")
    images = _images()
    found = network(images)
    assert (found.shape, found.dtype) == ((3, 12), torch.float32)
    assert (network.name, network.mmd_name) == ("tiny-clip", "mmd"), "only the published network gives CMMD"
    whole = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        rounded = ((images + 1) * 127.5).round() / 127.5 - 1
        expected = whole.get_image_features(pixel_values=network.preprocessing(rounded)).pooler_output
    torch.testing.assert_close(found, expected)
    assert torch.equal(network(((images + 1) * 127.5).round().to(torch.uint8)), found), "8 bits are 8 bits"


@pytest.mark.parametrize("kind", ["vit", "resnet", "siglip"])
def test_other_vision_models_give_one_vector_for_each_image(tmp_path, kind):
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind == "vit":
        config = transformers.ViTConfig(**small, image_size=16, patch_size=8)
        model, dimensions = transformers.ViTModel(config, add_pooling_layer=False), 16
    elif kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1])
        model, dimensions = transformers.ResNetModel(config), 24
    else:
        config = transformers.SiglipConfig(
            text_config=small | {"vocab_size": 9, "projection_size": 16},
            vision_config=small | {"image_size": 16, "patch_size": 8},
        )
        model, dimensions = transformers.SiglipModel(config), 16
    model.save_pretrained(tmp_path)
    network = TransformersFeatures(str(tmp_path), "cpu")
    grey = _images(4, 1)
    found = network(grey)
    assert found.shape == (4, dimensions)
    torch.testing.assert_close(found[1:2], network(grey[1:2]), msg="an image's features are its own")
    assert not torch.allclose(found[0], found[1])


def test_digest_follows_weights_and_preprocessing(clip_folder, tmp_path):
    first = TransformersFeatures(str(clip_folder), "cpu")
    other = shutil.copytree(clip_folder, tmp_path / "other")
    assert TransformersFeatures(str(other), "cpu").digest == first.digest
    _preprocessor(other, size=30, crop_size=30)
    assert TransformersFeatures(str(other), "cpu").digest != first.digest
    layer = torch.nn.Linear(2, 2)  # any weights will do
    before = weights_digest(layer)
    layer.weight.data[0, 0] += 1
    assert weights_digest(layer) != before


def test_real_mobilenet_tells_flowers_from_faces():
    network = open_features(str(shared("models/mobilenet-v1-imagenet")), "cpu")

    def features(name, indices):
        data = ImageData(str(shared(f"data/{name}.parquet")), image_size=64, split="validation", cache_gb=0)
        return network(torch.stack([data[i]["image"] for i in indices]))

    flowers, others = (features("flowers128-validation", range(i, 24, 2)) for i in (0, 1))
    faces = features("faces64-validation", range(12))
    assert flowers.shape == (12, 1024)
    assert CMMD(flowers, faces).item() > 3 * CMMD(flowers, others).item()


def test_classifier_features_are_the_classifiers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = SmallClassifier(1, 3)
    pixels = _images(5, 1, 16)
    rounded = ((pixels + 1) * 127.5).round() / 127.5 - 1
    torch.testing.assert_close(ClassifierFeatures(classifier, "cpu")(pixels), classifier.features(rounded))


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """A stand-in for torch-fidelity whose weights are a file of torch.hub's folder."""
    package = ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    package.seen = []

    class Extractor(torch.nn.Module):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__()
            assert features == ["2048"]
            self.load_state_dict(torch.load(feature_extractor_weights_path))

        def forward(self, x):
            package.seen.append(x)
            return (x.float().mean((2, 3)),)

    package.feature_extractor_inceptionv3.FeatureExtractorInceptionV3 = Extractor
    package.feature_extractor_inceptionv3.URL_INCEPTION_V3 = "https://example.org/inception.pth"
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    package.weights = tmp_path / "checkpoints" / "inception.pth"
    package.weights.parent.mkdir()
    torch.save({}, package.weights)
    return package


def test_inception_gets_rgb_bytes(fidelity, monkeypatch):
    published = hashlib.sha256(fidelity.weights.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "INCEPTION_SHA256", published)
    network = open_features("inception", "cpu")
    assert network(_images(2, 1)).shape == (2, 3)
    assert (fidelity.seen[0].shape, fidelity.seen[0].dtype) == ((2, 3, 20, 20), torch.uint8)
    assert (network.frechet_name, network.kernel_name) == ("fid", "kid")


def test_other_inception_weights_are_not_even_opened(fidelity, monkeypatch):
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UserError, match=r"inception.pth is not the published Inception network.*delete it"):
        open_features("inception", "cpu")


def test_a_download_of_other_inception_weights_is_refused(fidelity, monkeypatch):
    fidelity.weights.unlink()

    def download(url, path, hash_prefix):
        assert len(hash_prefix) == 64
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(UserError, match="cannot download the Inception weights.*invalid hash"):
        open_features("inception", "cpu")


def test_code_and_pickles_beside_a_network_are_never_run(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "code")
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": mapped}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot load the network"):
        TransformersFeatures(str(folder), "cpu")
    assert not (tmp_path / "ran").exists()
    pickled = shutil.copytree(clip_folder, tmp_path / "pickled")
    torch.save({}, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(UserError, match="safetensors"):
        TransformersFeatures(str(pickled), "cpu")


def test_the_default_network_is_one_commit_and_its_download_is_told(monkeypatch, clip_folder, capsys):
    asked = []
    config = transformers.CLIPConfig.from_pretrained(clip_folder)

    def given(result):
        return lambda **options: asked.append(options) or result

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", given(config))
    monkeypatch.setattr(module, "is_cached", lambda *file: len(asked) > 0)
    monkeypatch.setattr(module, "_check_reachable", lambda name, revision: None)
    monkeypatch.setattr(module, "_preprocessor_settings", lambda name, revision: {})
    model = transformers.CLIPModel(config)
    _, _, source = module.load_model(module.CLIP, lambda config: given(model))
    assert capsys.readouterr().err == f"downloading the network {module.CLIP} from the Hub, once\n"
    assert source["revision"] == module.CLIP_COMMIT and len(module.CLIP_COMMIT) == 40
    assert all(options.items() >= source.items() for options in asked)
    assert asked[-1]["weights_only"] is True and source["trust_remote_code"] is False
    for name, revision in ((f"{module.CLIP}@main", "main"), ("owner/name@v1", "v1"), ("owner/name", None)):
        _, _, source = module.load_model(name, lambda config: given(model))
        assert source.get("revision") == revision
        assert asked[-1]["use_safetensors"] is True
    assert capsys.readouterr().err == ""
    assert os.environ["DISABLE_SAFETENSORS_CONVERSION"] == "1", "no weights that a bot proposed"


def test_what_is_missing_is_named(monkeypatch, tmp_path, clip_folder):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        InceptionFeatures("cpu")
    with pytest.raises(UserError, match="cannot load the network"):
        TransformersFeatures(str(tmp_path), "cpu")
    text = transformers.BertConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9
    )
    transformers.BertModel(text).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="takes no images"):
        TransformersFeatures(str(tmp_path / "bert"), "cpu")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"lediflow\[eval\]"):
        TransformersFeatures(str(clip_folder), "cpu")


def test_clip_score_is_the_cosine_of_the_embeddings(clip_folder):
    score, images = ClipScore(str(clip_folder)), _images()
    texts = ["a cab", "deaf", "a bag of beads and a cage"]
    found = score(images, texts)
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    for i, text in enumerate(texts):
        tokens = tokenizer([text], truncation=True, max_length=8, return_tensors="pt")
        rounded = ((images[i : i + 1] + 1) * 127.5).round() / 127.5 - 1
        with torch.no_grad():
            a = model.get_image_features(pixel_values=score._preprocessing(rounded)).pooler_output
            b = model.get_text_features(**tokens).pooler_output
        cosine = torch.cosine_similarity(a, b).clamp(min=0).item()
        assert found[i].item() == pytest.approx(100 * cosine, abs=1e-3)
    with pytest.raises(UserError, match="3 images, 1 texts"):
        score(images, ["a"])

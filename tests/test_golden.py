"""Images and losses of fixed weights, kept from before conditions, couplings and objectives were parted.

golden/pipelines.safetensors holds the weights of four tiny networks with classes and average velocities, what
pipelines made of them, and the loss and gradient norm of every stage on eight digits.
"""

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline
from lediflow.data.batches import batches
from lediflow.data.images import ImageData
from lediflow.sources import BatchNoise
from lediflow.training.builders import NETWORKS, build_stage
from lediflow.training.config import load_config
from lediflow.training.couplings import Context
from lediflow.training.stages import STAGES

GOLDEN = ROOT / "tests" / "golden"
CPU = torch.device("cpu")
REQUESTS = {
    "mean": {"seed": 5},
    "midpoint": {
        "seed": 5,
        "solver": "midpoint",
        "steps": 2,
        "latent_solver": "heun3",
        "latent_steps": 1,
        "class_labels": [7, 2],
    },
    "guided": {
        "seed": 6,
        "solver": "mean",
        "steps": 2,
        "latent_solver": "euler",
        "latent_steps": 2,
        "guidance": 2.0,
        "latent_guidance": 1.5,
        "first_image": 3,
    },
    "gaussian": {"seed": 5},
    "gaussian-guided": {"seed": 5, "solver": "midpoint", "steps": 2, "guidance": 2.0},
}


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "pipelines.safetensors")


@pytest.fixture(scope="module")
def config():
    return load_config(GOLDEN / "pipelines.yaml")


def network(golden, config, name, average_velocity=True):
    network = NETWORKS[name](config, average_velocity=average_velocity)
    wanted = network.state_dict()
    network.load_state_dict({key: golden[f"{name}.{key}"].float() for key in wanted})
    return network.eval()


@pytest.mark.parametrize("name", REQUESTS)
def test_images_of_fixed_weights(name, golden, config):
    if name.startswith("gaussian"):
        pipeline = FlowMatchingPipeline(flow=network(golden, config, "baseline"))
    else:
        parts = {part: network(golden, config, part) for part in ("auxiliary", "flow", "sampler")}
        pipeline = LeDiFlowPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(3, output_type="pt", **REQUESTS[name]).images
    torch.testing.assert_close(images, golden[f"images.{name}"].float(), rtol=0, atol=2e-3)


KEPT = (
    "auxiliary",
    "flow",
    "sampler",
    "baseline",
    "meanflow",
    "sampler-meanflow",
    "baseline-meanflow",
    "distill",
)


@pytest.mark.parametrize("name", KEPT)
def test_losses_of_fixed_weights(name, golden, config, tmp_path):
    """The loss and gradient of a stage on the first batch of digits."""
    spec = STAGES[name]
    digits = ImageData("digits", image_size=16, channels=1, flip=False)
    context = Context(config, digits, CPU, lambda stage: network(golden, config, stage, False))
    stage = build_stage(name, context)
    stage.network = network(golden, config, spec.network, stage.average_velocity).train()
    if name == "distill":
        stage.make_pairs(tmp_path, "golden")
        stage.load_pairs()
    batch = next(batches(digits, batch_size=8, seed=0, stop=1))
    noise = BatchNoise(3, batch_size=8, positions=range(8), device=CPU)
    loss, _ = stage.loss(stage.network, batch, noise)
    loss.backward()
    norms = [p.grad.norm() for p in stage.network.parameters() if p.grad is not None]
    found = torch.stack([loss.detach(), torch.stack(norms).norm()])
    torch.testing.assert_close(found, golden[f"loss.{name}"], rtol=1e-4, atol=1e-6)

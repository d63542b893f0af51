"""VelocityTransformer and AuxiliaryModel: conditions, shapes, precision, saving, overfitting one image."""

import copy

import pytest
import torch
from conftest import randomized

from lediflow import flow, ode
from lediflow.conditions import Conditions
from lediflow.errors import UserError
from lediflow.gaussian import elbo_loss
from lediflow.networks.auxiliary import AuxiliaryModel, soft_clamp
from lediflow.networks.velocity import VelocityTransformer

SMALL = {
    "widths": (16, 24),
    "depths": (1, 1),
    "d_head": 8,
    "mapping_width": 16,
    "mapping_depth": 1,
    "kernel_size": 3,
}
AUX = {"widths": (16, 24), "depths": (1, 1), "d_head": 8, "kernel_size": 3, "patch_size": 2, "z_size": 2}
Z = {"embedder": "grid", "channels": 2, "size": 2}
LABEL = {"embedder": "class", "classes": 3}


def test_starts_as_zero_velocity():
    net = VelocityTransformer(8, 3, 2, **SMALL)
    assert (net(torch.randn(2, 3, 8, 8), torch.rand(2)) == 0).all()


@pytest.mark.parametrize("embedder", ["grid", "flat"])
@pytest.mark.parametrize("size", [2, 8])
def test_every_condition_has_an_effect(embedder, size):
    conditions = {"label": LABEL, "z": {"embedder": embedder, "channels": 2, "size": size}}
    net = randomized(VelocityTransformer((8, 8), 3, 2, conditions=conditions, **SMALL))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.2])
    told = Conditions(z=torch.randn(2, 2, size, size), label=torch.tensor([0, 1]))
    base = net(x, t, told)
    assert base.shape == x.shape
    for changed in (
        net(x, t + 0.3, told),
        net(x, t, told.also(z=told["z"] + 1)),
        net(x, t, told.also(label=told["label"] + 1)),
        net(x, t, told.drop("label")),
        net(x + 1, t, told),
    ):
        assert (changed - base).abs().amax((1, 2, 3)).min() > 1e-4


def test_z_reaches_the_place_it_stands_for():
    """On a grid, z at the top left acts on the top left; at the start attention passes nothing on."""
    net = VelocityTransformer(
        8, 1, 2, (16,), (1,), d_head=8, mapping_width=16, conditions={"z": {**Z, "channels": 1}}
    )
    torch.nn.init.normal_(net.patch_out.proj.weight)
    x, t, z = torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, 1, 2, 2)
    z[0, 0, 0, 0] = 1
    out = net(x, t, Conditions(z=z))
    assert (out[..., :4, :4] != 0).any()
    assert (out[..., 4:, :] == 0).all()
    assert (out[..., 4:] == 0).all()


def test_non_square_images_and_scalar_time():
    net = randomized(VelocityTransformer((8, 16), 3, 2, **SMALL))
    x = torch.randn(1, 3, 8, 16)
    torch.testing.assert_close(net(x, torch.tensor(0.3)), net(x, torch.tensor([0.3])))


def test_batch_size_does_not_change_an_image():
    net = randomized(VelocityTransformer(8, 3, 2, **SMALL))
    x, t = torch.randn(5, 3, 8, 8), torch.rand(5)
    whole = net(x, t)
    torch.testing.assert_close(whole[3:4], net(x[3:4], t[3:4]), rtol=1e-4, atol=1e-5)


def test_missing_and_superfluous_conditions_are_named():
    net = VelocityTransformer(8, 3, 2, conditions={"z": Z}, **SMALL)
    x, t, z = torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 2, 2, 2)
    with pytest.raises(ValueError, match="needs the condition 'z' for every image"):
        net(x, t)
    with pytest.raises(ValueError, match="has no condition 'label'"):
        net(x, t, Conditions(z=z, label=torch.zeros(1, dtype=torch.long)))


def test_z_that_fits_no_grid_is_refused():
    with pytest.raises(UserError, match=r"condition of 3x3 does not fit a grid of 4x4 tokens.*change z_size"):
        VelocityTransformer(8, 3, 2, conditions={"z": {**Z, "size": 3}}, **SMALL)
    with pytest.raises(UserError, match="cannot be reached"):
        AuxiliaryModel(12, 3, **AUX)
    with pytest.raises(UserError, match="needs at least 3 levels, not 2"):
        AuxiliaryModel(16, 3, **AUX)


def test_auxiliary_shapes_and_standardised_z():
    net = randomized(AuxiliaryModel(8, 3, decoder_widths=(8, 16), decoder_depths=(1, 2), **AUX))
    y = torch.randn(2, 3, 8, 8)
    q = net.encode(y)
    assert q.mean.shape == q.log_var.shape == (2, 4, 2, 2)
    prior = net.decode(q.mean)
    assert prior.mean.shape == prior.log_var.shape == y.shape
    net.z_mean.fill_(3.0)
    net.z_std.fill_(2.0)
    torch.testing.assert_close(net.unstandardize(net.standardize(q.mean)), q.mean)
    assert net.standardize(torch.full((1, 4, 1, 1), 5.0)).unique().tolist() == [1.0]


def test_levels_beyond_the_merges_stay_on_the_grid_of_z():
    net = randomized(AuxiliaryModel(8, 3, 2, (16, 24, 32), (1, 1, 1), d_head=8, z_size=2))
    assert net.decode(net.encode(torch.randn(1, 3, 8, 8)).mean).mean.shape == (1, 3, 8, 8)


def test_log_variances_stay_fp32_under_autocast_and_inside_their_limits():
    net = randomized(AuxiliaryModel(8, 3, **AUX), scale=30.0)
    with torch.autocast("cpu", torch.bfloat16):
        q = net.encode(torch.randn(2, 3, 8, 8))
        prior = net.decode(q.mean)
    assert q.log_var.dtype == prior.log_var.dtype == torch.float32
    assert -9.001 < prior.log_var.min() < -8.5
    assert 1.5 < prior.log_var.max() < 2.001


def test_soft_clamp_is_the_identity_in_the_middle_and_never_flat():
    x = torch.linspace(-12, 6, 50, dtype=torch.float64, requires_grad=True)
    y = soft_clamp(x, -9, 2)
    middle = (x > -5) & (x < -2)
    torch.testing.assert_close(y[middle], x[middle], rtol=0, atol=0.03)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert (gradient > 0).all()
    assert torch.autograd.gradcheck(lambda u: soft_clamp(u, -9, 2), (x,))


def test_models_come_back_from_disk_as_they_were(tmp_path):
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    net = randomized(VelocityTransformer(8, 3, 2, **SMALL))
    net.save_pretrained(tmp_path / "flow")
    assert [p.name for p in (tmp_path / "flow").glob("*.safetensors")]
    assert torch.equal(VelocityTransformer.from_pretrained(tmp_path / "flow")(x, t), net(x, t))
    auxiliary = randomized(AuxiliaryModel(8, 3, **AUX))
    auxiliary.z_std.fill_(2.0)
    auxiliary.save_pretrained(tmp_path / "auxiliary")
    loaded = AuxiliaryModel.from_pretrained(tmp_path / "auxiliary")
    assert torch.equal(
        loaded.decode(torch.ones(1, 4, 2, 2)).mean, auxiliary.decode(torch.ones(1, 4, 2, 2)).mean
    )
    assert (loaded.z_std == 2).all()


@pytest.mark.parametrize("backend", ["dense", "tiles", "flex"])
def test_compiled_without_graph_breaks(monkeypatch, backend):
    monkeypatch.setenv("LEDIFLOW_ATTENTION", backend)
    torch._dynamo.reset()
    net = randomized(VelocityTransformer(8, 3, 1, conditions={"z": Z}, **SMALL))
    x, t, z = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, 2, 2, 2)
    with torch.no_grad():
        explanation = torch._dynamo.explain(net)(x, t, Conditions(z=z))
    assert explanation.graph_break_count == 0, explanation.break_reasons


@pytest.mark.parametrize("how", ["model", "blocks"])
def test_compiled_networks_agree_at_any_batch_size_and_are_not_compiled_for_each(how):
    torch._dynamo.reset()
    net = randomized(VelocityTransformer(16, 3, 2, conditions={"z": Z}, **SMALL))
    compiled = copy.deepcopy(net)
    compiled.compile_as(how, backend="aot_eager")
    counters = torch._dynamo.utils.counters["stats"]
    graphs = []
    for batch in (2, 3, 5, 8, 4):
        x, t, z = torch.randn(batch, 3, 16, 16), torch.rand(batch), torch.randn(batch, 2, 2, 2)
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(x, t, Conditions(z=z)), net(x, t, Conditions(z=z)), rtol=1e-4, atol=1e-4
            )
        graphs.append(counters["unique_graphs"])
    assert graphs[-1] == graphs[1], "the second batch size made the batch dynamic"
    assert compiled.state_dict().keys() == net.state_dict().keys()


def test_compiled_to_machine_code_gives_the_same():
    net = randomized(VelocityTransformer(8, 3, 2, (16,), (1,), d_head=8, mapping_width=16))
    compiled = copy.deepcopy(net)
    compiled.compile_as("model")
    x, t = torch.randn(2, 3, 8, 8), torch.rand(2)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t), net(x, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["velocity", "auxiliary"])
def test_gradient_checkpointing_changes_nothing_but_memory(kind):
    if kind == "velocity":
        plain = randomized(VelocityTransformer(8, 3, 2, **SMALL))
        arguments = torch.randn(2, 3, 8, 8), torch.rand(2)
    else:
        plain = randomized(AuxiliaryModel(8, 3, mapping_width=16, **AUX))
        arguments = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 2, 2)
    saved = copy.deepcopy(plain)
    saved.enable_gradient_checkpointing()
    kept = []
    for net in (plain, saved):
        stored = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, stored=stored: stored.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t
        ):
            out = net(*arguments)
        out = out if kind == "velocity" else out[1].mean + out[1].log_var
        out.square().mean().backward()
        kept.append(sum(stored.values()))
    assert kept[1] < 0.5 * kept[0]
    for a, b in zip(plain.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_bf16_weights_compute_close_to_fp32_and_keep_their_buffers():
    exact = randomized(VelocityTransformer(8, 3, 2, conditions={"z": Z}, **SMALL), scale=0.1)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    assert rounded.time_features.frequencies.dtype == torch.float32
    assert torch.equal(rounded.time_features.frequencies, exact.time_features.frequencies)
    x, t, z = torch.randn(4, 3, 8, 8), torch.rand(4), torch.randn(4, 2, 2, 2)
    with torch.no_grad():
        a, b = exact(x, t, Conditions(z=z)), rounded(x, t, Conditions(z=z))
    assert b.dtype == torch.float32
    assert (a - b).norm() < 0.03 * a.norm()

    exact = randomized(AuxiliaryModel(8, 3, mapping_width=16, mapping_depth=1, **AUX), scale=0.1)
    exact.z_std.fill_(1.2345678)
    rounded = copy.deepcopy(exact).to(torch.bfloat16)
    assert torch.equal(rounded.z_std, exact.z_std)
    with torch.no_grad():
        encoded = exact.encode(x).mean, rounded.encode(x).mean
        # of the same z: where encodings are small, the decoder's norms would enlarge what was rounded in them
        decoded = exact.decode(encoded[0]).mean, rounded.decode(encoded[0]).mean
    for a, b in (encoded, decoded):
        assert (a - b).norm() < 0.05 * a.norm()


def test_loaded_in_bf16(tmp_path):
    net = randomized(VelocityTransformer(8, 3, 2, **SMALL))
    net.save_pretrained(tmp_path)
    loaded = VelocityTransformer.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.patch_in.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.time_features.frequencies, net.time_features.frequencies)


def test_z_scales_the_norms_of_the_decoder():
    net = randomized(AuxiliaryModel(8, 3, mapping_width=16, mapping_depth=1, **AUX))
    assert net.decoder[0][0].attention_norm.adaptive
    assert not net.encoder[0][0].attention_norm.adaptive
    z = torch.randn(2, 4, 2, 2)
    before = net.decode(z).mean
    with torch.no_grad():
        net.mapping_in.weight.neg_()
    assert (net.decode(z).mean - before).abs().max() > 1e-4


def test_overfitting_one_image_gives_a_tight_prior_and_a_one_step_reconstruction():
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        auxiliary = AuxiliaryModel(8, 1, **AUX)
        net = VelocityTransformer(8, 1, 2, conditions={"z": {**Z, "channels": 4}}, **SMALL)
    y = (torch.rand(1, 1, 8, 8, generator=g) * 2 - 1).expand(16, -1, -1, -1)

    optimizer = torch.optim.AdamW(auxiliary.parameters(), lr=3e-3)
    for _ in range(120):
        noise = torch.randn(16, 4, 2, 2, generator=g)
        posterior, prior = auxiliary(y, noise)
        optimizer.zero_grad()
        elbo_loss(prior, y, posterior, beta=0.1).backward()
        torch.nn.utils.clip_grad_norm_(auxiliary.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        z = auxiliary.encode(y).sample(g)
        prior = auxiliary.decode(z)
    assert prior.std.mean() < 0.2
    assert (prior.mean - y).abs().mean() < 0.2

    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(300):
        x, t = prior.sample(g), flow.stratified_t(16, g)
        loss = flow.weighted_matching_loss(net(flow.phi(x, y, t), t, Conditions(z=z)), x, y, prior.std)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x = prior.sample(g)
    before = (x - y).square().mean().sqrt()
    end = ode.integrate(lambda t, state: net(state, t, Conditions(z=z)), x, steps=1, solver="midpoint").end
    assert (end - y).square().mean().sqrt() < min(0.05, 0.75 * before)

"""Editing against its definitions: the latent's way there and back, eq. 7, SDEdit; what must not change."""

import numpy as np
import pytest
import torch
from conftest import random_network, tiny_codec_settings
from PIL import Image
from test_parts import by_midpoint, networks

from lediflow import FlowMatchingPipeline, LeDiFlowPipeline, UserError, ode
from lediflow.codecs import Codec, CodecSpace
from lediflow.conditions import Conditions
from lediflow.pictures import to_float
from lediflow.sources import between, image_noise
from lediflow.training.config import load_config

PARTS = (("auxiliary", "auxiliary"), ("flow", "flow"), ("sampler", "sampler"))
ONE_STEP = {"solver": "euler", "steps": 1}


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipe():
    return quiet(LeDiFlowPipeline(**networks(*PARTS)))


@pytest.fixture(scope="module")
def mean_pipe():
    mean = (("auxiliary", "auxiliary"), ("flow", "meanflow"), ("sampler", "sampler-meanflow"))
    return quiet(LeDiFlowPipeline(**networks(*mean)))


@pytest.fixture(scope="module")
def plain():
    return quiet(FlowMatchingPipeline(**networks(("flow", "baseline"))))


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def y():
    return torch.rand(1, 16, 16) * 2 - 1


@pytest.fixture
def mask():
    mask = np.zeros((16, 16), bool)
    mask[4:12, 5:13] = True
    return mask


def grey(height, width):
    return np.random.default_rng(1).integers(0, 256, (height, width), dtype=np.uint8)


def w_noise(pipe, seed, indices, stream):
    return image_noise(pipe.auxiliary.z_shape, seed=seed, indices=indices, stream=stream)


def x_noise(pipe, seed, indices):
    return image_noise(pipe.sample_shape, seed=seed, indices=indices, stream="x")


# Reconstruct and invert


def test_reconstruct_is_encode_prior_sample_and_carry(pipe):
    images = [torch.rand(1, 16, 16) * 2 - 1 for _ in range(3)]
    out = pipe.reconstruct(images, seed=5, solver="midpoint", steps=2, batch_size=2, output_type="pt")
    z = pipe.encode(torch.stack(images)).mean
    prior = pipe.prior(z)
    x = prior.mean + prior.std * x_noise(pipe, 5, range(3))
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(out.prior_mean, prior.mean.clamp(-1, 1), **close)
    torch.testing.assert_close(out.prior_sample, x.clamp(-1, 1), **close)
    end = pipe.carry(x, z, solver="midpoint", steps=2).end
    torch.testing.assert_close(out.images, end.clamp(-1, 1), **close)
    assert out.nfe == {"encoder": 1, "decoder": 1, "flow": 4}
    one = pipe.reconstruct(Image.fromarray(grey(40, 70)))
    assert one.images[0].size == one.prior_mean[0].size == (16, 16)


def test_the_way_to_the_noise_and_back_is_exact_with_dopri5_and_better_with_more_steps(pipe):
    w = torch.randn(2, 4, 4, 4)

    def error(solver, steps):
        z = pipe.sample_z(w, solver=solver, steps=steps).end
        back = pipe.invert_z(z, solver=solver, steps=steps).end
        return float((back - w).norm() / w.norm())

    assert error("dopri5", 1) < 1e-3
    for solver, steps in (("euler", (4, 16, 64)), ("midpoint", (2, 8, 32)), ("rk4", (1, 4, 16))):
        errors = [error(solver, n) for n in steps]
        assert errors == sorted(errors, reverse=True) and errors[0] > 5 * errors[-1], (solver, errors)


def test_an_inverted_picture_comes_back(pipe, mean_pipe, y):
    """Also in a model refined to one evaluation: along its velocity."""
    exact = {"solver": "dopri5", "latent_solver": "dopri5"}
    found = mean_pipe.invert([y], **exact)
    z = mean_pipe.sample_z(found.w, solver="dopri5").end
    assert (z - found.z).norm() < 1e-3 * found.z.norm()
    prior = mean_pipe.prior(found.z)
    x = prior.mean + prior.std * found.noise
    again = mean_pipe.carry(x, found.z, solver="dopri5").end
    assert (again - y).norm() < 3e-3 * y.norm(), "a random flow is stiff"
    assert pipe.invert(y).nfe == {"encoder": 1, "sampler": 32, "decoder": 1, "flow": 32}
    with pytest.raises(UserError, match="only goes from the source"):
        mean_pipe.invert(y, latent_solver="mean")


def test_what_is_hidden_gets_a_z_of_the_latent_sampler(pipe, plain, y, mask):
    """Its cells differ from variant to variant; those around stay, and a speck is left to the encoder."""
    mask[:] = False
    mask[4:12, 4:12] = True  # 2 x 2 of the 4 x 4 cells
    hidden = torch.from_numpy(mask)[None, None]
    _, told, nfe = pipe._source(y[None], range(3), 5, Conditions(), region=hidden, hide=True)
    assert nfe == {"encoder": 2, "decoder": 2, "sampler": 32}
    inside, z = torch.from_numpy(mask[::4, ::4]), told["z"]
    w = pipe.auxiliary.unstandardize(w_noise(pipe, 5, range(3), "w"))
    assert (z - w)[..., inside].abs().min() > 1e-6 and (z[0] - z[1])[..., inside].abs().min() > 1e-6
    filled_in = torch.where(hidden, pipe.prior(_first_round(pipe, y, inside, 5)).mean, y)
    torch.testing.assert_close(z[..., ~inside], pipe.encode(filled_in).mean[..., ~inside])

    made = pipe.inpaint(y, mask, masked_content="fill", num_images=2, seed=5, **ONE_STEP)
    assert made.nfe == {**nfe, "flow": 1}
    assert plain.inpaint(y, mask, masked_content="fill", num_images=1, **ONE_STEP).nfe == {"flow": 1}
    mask[:] = False
    mask[5, 5] = True
    speck = pipe.inpaint(y, mask, masked_content="fill", num_images=1, **ONE_STEP)
    assert speck.nfe == {"encoder": 1, "decoder": 1, "flow": 1}


def _first_round(pipe, y, inside, seed):
    """Eq. 7 in the space of z by the midpoint rule; known cells go in a straight line."""
    w = w_noise(pipe, seed, range(3), "w")
    known = pipe.auxiliary.standardize(pipe.encode(y[None]).mean.expand(3, -1, -1, -1))
    field = pipe.field(pipe.sampler, Conditions(), count=3)

    def v(z, t):
        return torch.where(inside, field(torch.full((3,), t), z), known - w)

    z = w
    for i in range(8):
        z = z + v(z + v(z, i / 8) / 16, (i + 0.5) / 8) / 8
    return pipe.auxiliary.unstandardize(torch.where(inside, z, known))


def test_strength_changes_z_of_what_the_mask_touches_alone(pipe, y, mask):
    region = torch.from_numpy(mask)[None, None]  # rows 4 to 12 and columns 5 to 13
    touched = torch.zeros(4, 4, dtype=torch.bool)
    touched[1:3, 1:4] = True
    z = pipe.encode(y[None]).mean
    for strength, hide in ((0.0, False), (0.5, False), (1.0, False)):
        _, told, nfe = pipe._source(
            y[None], [0], 2, Conditions(), strength=strength, region=region, hide=hide
        )
        changed = (told["z"] - z).abs().amax(1)[0] > 1e-5
        assert changed.equal(touched if strength else torch.zeros_like(touched))
        assert nfe.get("sampler", 0) == (32 if strength else 0)
    _, everywhere, _ = pipe._source(y[None], [0], 2, Conditions(), strength=0.5)
    w = 0.75**0.5 * pipe.invert_z(z, steps=8).end + 0.5 * w_noise(pipe, 2, [0], "r")
    torch.testing.assert_close(everywhere["z"], pipe.sample_z(w, steps=8, solver="midpoint").end)


def test_a_strength_of_one_forgets_the_picture_and_any_keeps_the_variance(pipe, y):
    from lediflow.pipelines.latent_start import moved_noise

    w, r = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for strength in (0.0, 0.3, 1.0):
        moved = moved_noise(w, r, strength)
        assert float(moved.var()) == pytest.approx(1, abs=0.02)
        assert float((moved * r).mean()) == pytest.approx(strength, abs=0.02)
    there, other = (
        pipe._source(picture[None], [0], 2, Conditions(), strength=1.0)[1]["z"] for picture in (y, y.flip(-1))
    )
    torch.testing.assert_close(there, other)


def test_a_flow_with_a_strength_of_its_own_is_inverted_and_edited_with_it(y, mask):
    """`carry` guides by the best strength of training unless told otherwise; so does the way back."""
    weak = networks(("flow", "flow"), scale=0.1)["flow"]
    guided = quiet(LeDiFlowPipeline(**networks(*PARTS), weak_flow=weak, strengths={"autoguidance": 1.5}))
    found = guided.invert([y], solver="rk4", steps=32)
    again = guided.carry(found.x, found.z, solver="rk4", steps=32).end
    assert (again - y).norm() < 3e-3 * y.norm()
    plain = guided.carry(found.x, found.z, solver="rk4", steps=32, autoguidance=1.0).end
    assert (plain - y).norm() > 3e-2 * y.norm(), "the strength makes a difference"
    nfe = {"encoder": 1, "decoder": 1, "flow": 2}  # two evaluations where it is guided
    assert guided.inpaint(y, mask, num_images=1, **ONE_STEP).nfe == nfe
    assert guided.vary(y, 0, num_images=1, **ONE_STEP).nfe == nfe


# Interpolate


@pytest.mark.parametrize("path", ["linear", "slerp"])
@pytest.mark.parametrize("space", ["noise", "latent"])
def test_interpolation_goes_through_the_space_with_constant_noise(space, path, pipe, y):
    other = -y
    out = pipe.interpolate(
        y, other, num_images=3, space=space, path=path, seed=2, output_type="pt", **ONE_STEP
    )
    z = pipe.encode(torch.stack([y, other])).mean
    if space == "noise":
        w = pipe.invert_z(z, steps=8).end
        middle = pipe.sample_z(between(*w, 0.5, path)[None], solver="midpoint", steps=8).end
    else:
        ends = pipe.auxiliary.standardize(z)
        middle = pipe.auxiliary.unstandardize(between(*ends, 0.5, path)[None])
    x = pipe.prior(middle).at(x_noise(pipe, 2, [0]))
    end = pipe.carry(x, middle, **ONE_STEP).end
    torch.testing.assert_close(out.images[1:2], end.clamp(-1, 1), rtol=0, atol=1e-4)
    sampler = {"sampler": 16} if space == "noise" else {}
    assert out.nfe == {"encoder": 1, **sampler, "decoder": 1, "flow": 1}


def test_interpolation_between_seeds_begins_and_ends_at_their_images(pipe):
    latent = {"latent_solver": "midpoint", "latent_steps": 8}
    same = {"class_labels": 6, "output_type": "pt", **ONE_STEP, **latent}
    out = pipe.interpolate(3, 7, num_images=4, seed=3, **same)
    first = pipe(1, seed=3, **same).images
    torch.testing.assert_close(out.images[:1], first, rtol=0, atol=1e-5)
    assert len(out.images) == 4


def test_several_ends_and_loops(pipe, y):
    def images(*ends, **options):
        return pipe.interpolate(*ends, num_images=4, output_type="pt", **ONE_STEP, **options).images

    through, loop = images(1, 2, 3), images(1, 2, 3, loop=True, batch_size=4)
    assert len(through) == 7 and len(loop) == 9
    torch.testing.assert_close(loop[:7], through, rtol=0, atol=1e-5)
    torch.testing.assert_close(images(3, 1)[1:3], loop[7:], rtol=0, atol=1e-5)
    assert len(images(y, 4)) == 4, "a picture and a seed"


@pytest.mark.parametrize(
    ("ends", "options", "message"),
    [
        ((1,), {}, "between two or more"),
        ((1, 2), {"num_images": 1}, "at least 2, both ends"),
        ((1, 2), {"space": "latnt"}, "did you mean 'latent'"),
        ((1, 2), {"path": "arc"}, "choose from linear, slerp"),
        ((1, 2), {"latent_solver": "midpont"}, "did you mean 'midpoint'"),
        ((1, 2), {"latent_steps": 0}, "steps must be at least 1"),
        (("a.png", 2), {}, "not str"),
    ],
)
def test_bad_interpolations(ends, options, message, pipe):
    with pytest.raises(UserError, match=message):
        pipe.interpolate(*ends, **options)


# Vary


def test_a_variant_is_made_of_the_noise_of_z_moved_a_little(pipe, y):
    out = pipe.vary(y, 0.3, num_images=3, seed=6, batch_size=2, output_type="pt", **ONE_STEP)
    z = pipe.encode(y[None]).mean.expand(3, -1, -1, -1)
    w = pipe.invert_z(z, steps=8).end
    w = 0.91**0.5 * w + 0.3 * w_noise(pipe, 6, range(3), "r")
    moved = pipe.sample_z(w, solver="midpoint", steps=8).end
    x = pipe.prior(moved).at(x_noise(pipe, 6, range(3)))
    end = pipe.carry(x, moved, **ONE_STEP).end
    torch.testing.assert_close(out.images, end.clamp(-1, 1), rtol=0, atol=1e-4)
    assert out.nfe == {"encoder": 1, "sampler": 32, "decoder": 1, "flow": 1}
    again = pipe.vary(y, 0.3, num_images=3, seed=6, batch_size=1, output_type="pt", **ONE_STEP)
    torch.testing.assert_close(again.images, out.images, rtol=0, atol=1e-5)


def test_the_two_halves_of_figure_6(pipe, y):
    details = pipe.vary(y, 0.0, num_images=3, output_type="pt")
    assert details.nfe == {"encoder": 1, "decoder": 1, "flow": 4}, "z stays, so nothing is inverted"
    assert torch.unique(details.images, dim=0).shape[0] == 3
    same = pipe.vary(y, 0.0, num_images=3, constant_noise=True, output_type="pt").images
    torch.testing.assert_close(same[1], same[0], rtol=0, atol=1e-6)
    only_z = pipe.vary(y, 0.5, num_images=3, constant_noise=True, output_type="pt").images
    assert torch.unique(only_z, dim=0).shape[0] == 3
    near, far = (pipe.vary(y, s, num_images=8, constant_noise=True, output_type="pt") for s in (0.05, 1.0))
    assert (near.images - same[:1]).square().mean() < (far.images - same[:1]).square().mean() / 4


def test_an_average_velocity_varies_too(mean_pipe, y):
    """By default z goes both ways along the velocity; with "mean" it comes back in one evaluation."""
    assert mean_pipe.vary(y, 0.5).nfe == {"encoder": 1, "sampler": 32, "decoder": 1, "flow": 1}
    out = mean_pipe.vary(y, 0.5, latent_solver="mean")
    assert out.nfe == {"encoder": 1, "sampler": 17, "decoder": 1, "flow": 1}


def test_what_a_mask_protects_stays_when_varied(pipe, mask):
    photo = grey(16, 16)
    out = pipe.vary(photo, 0.5, mask_image=mask, num_images=2, seed=3)
    expected = pipe.inpaint(photo, mask, strength=0.5, num_images=2, seed=3)
    for image, other in zip(out.images, expected.images, strict=True):
        assert image.tobytes() == other.tobytes()
        assert np.array_equal(np.array(image)[~mask], photo[~mask])


# Inpaint, eq. 7


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("solver", ode.SOLVERS)
@pytest.mark.parametrize("kind", ["mean_pipe", "plain"])
def test_outside_the_mask_nothing_changes_for_every_solver(kind, solver, steps, mask, request):
    pipeline = request.getfixturevalue(kind)
    if kind == "plain" and solver == "mean":
        pipeline = FlowMatchingPipeline(**networks(("flow", "baseline-meanflow")))
    photo = grey(16, 16)
    count = 1 if solver == "dopri5" else 2
    out = pipeline.inpaint(photo, mask, solver=solver, steps=steps, num_images=count)
    for image in out.images:
        assert np.array_equal(np.array(image)[~mask], photo[~mask])
        assert (np.array(image)[mask] != photo[mask]).mean() > 0.8
    if solver != "dopri5":
        assert out.nfe["flow"] == steps * ode.EVALUATIONS_PER_STEP[solver]


def test_inside_the_mask_is_the_flow_of_the_picture_that_is_there(pipe, plain, y, mask):
    hole = torch.from_numpy(mask)
    z = pipe.encode(y[None]).mean
    x = pipe.prior(z).at(x_noise(pipe, 4, [0]))
    out = pipe.inpaint(y, mask, seed=4, solver="euler", steps=2, output_type="pt")
    for start, told, found, network in (
        (x, Conditions(z=z), out, pipe.flow),
        (
            x_noise(plain, 4, [0]),
            Conditions(),
            plain.inpaint(y, mask, seed=4, solver="euler", steps=2, output_type="pt"),
            plain.flow,
        ),
    ):
        state = start
        for t in (0.0, 0.5):
            v = network(state, torch.tensor(t), told)
            state = state + 0.5 * torch.where(hole, v, y - start)
        inside = found.images[..., hole]
        torch.testing.assert_close(inside, state.clamp(-1, 1)[..., hole], rtol=0, atol=1e-5)
        assert torch.equal(found.images[..., ~hole], y[None][..., ~hole])


def test_strength_changes_z_and_what_is_hidden_is_not_looked_at(pipe, mask):
    photo = grey(16, 16)
    same, moved = (pipe.inpaint(photo, mask, strength=s, seed=2).images[0] for s in (0.0, 0.5))
    assert (np.array(same) != np.array(moved))[mask].mean() > 0.5
    hidden = photo.copy()
    hidden[mask] = 255 - hidden[mask]
    for content, equal in (("fill", True), ("original", False)):
        a, b = (pipe.inpaint(image, mask, masked_content=content).images[0] for image in (photo, hidden))
        assert (a.tobytes() == b.tobytes()) is equal
    clear = Image.fromarray(photo).convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(mask, 0, 255).astype(np.uint8)))
    cut = pipe.inpaint(clear, "alpha").images[0]
    assert cut.tobytes() == pipe.inpaint(photo, mask, masked_content="fill").images[0].tobytes()


@pytest.mark.parametrize("padding", [None, 0, 9])
def test_a_photo_of_any_size_keeps_it_and_all_outside_the_mask(padding, pipe):
    photo = grey(90, 131)
    mask = np.zeros((90, 131), np.uint8)
    mask[30:50, 70:110] = 255
    mask[50:54, 70:110] = 100
    out = pipe.inpaint(Image.fromarray(photo), Image.fromarray(mask), padding_mask_crop=padding, num_images=2)
    for image in out.images:
        assert image.size == (131, 90)
        assert np.array_equal(np.array(image)[mask == 0], photo[mask == 0])
        assert (np.array(image)[mask > 0] != photo[mask > 0]).mean() > 0.8
    tensor = to_float(torch.from_numpy(photo))[None]
    found = pipe.inpaint(tensor, mask, padding_mask_crop=padding, output_type="pt").images
    assert torch.equal(found[0, 0][mask == 0], tensor[0][mask == 0])


def test_variant_i_depends_on_seed_and_i_only(pipe, mask):
    photo = torch.rand(1, 16, 16)
    whole = pipe.inpaint(photo, mask, num_images=5, strength=0.4, output_type="pt").images
    parts = pipe.inpaint(photo, mask, num_images=5, strength=0.4, batch_size=2, output_type="pt").images
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    assert torch.unique(whole, dim=0).shape[0] == 5
    other = pipe.inpaint(photo, mask, num_images=5, strength=0.4, seed=1, output_type="pt").images
    assert not torch.allclose(other, whole, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 1.1}, "strength must be from 0 to 1, not 1.1"),
        ({"strength": -0.1}, "from 0 to 1"),
        ({"strength": float("nan")}, "from 0 to 1"),
        ({"num_images": 0}, "num_images must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"padding_mask_crop": -2}, "at least 0 pixels"),
        ({"feather": -1}, "feather must be at least 0"),
        ({"solver": "eular"}, "did you mean 'euler'"),
        ({"masked_content": "blur"}, "'original' or 'fill'"),
        ({"output_type": "np"}, "'pil' or 'pt'"),
        ({"class_labels": 11}, "not one of this model's"),
        ({"mask_image": np.zeros((16, 16), bool)}, "black everywhere"),
        ({"mask_image": np.ones((8, 8), bool)}, "a mask of the image's size"),
        ({"mask_image": "alpha"}, "no alpha channel"),
    ],
)
def test_bad_requests_to_inpaint(options, message, pipe, mask):
    with pytest.raises(UserError, match=message):
        pipe.inpaint(grey(16, 16), **{"mask_image": mask, **options})


def test_plain_flow_matching_has_no_latent_to_change(plain, mask):
    with pytest.raises(UserError, match="no latent z to change"):
        plain.inpaint(grey(16, 16), mask, strength=0.5)
    assert not hasattr(plain, "vary") and not hasattr(plain, "interpolate")


@pytest.fixture
def coded(tiny_codec):
    """A flow of latents, factor 2, with the codec's pictures of 16x16 in colour."""
    config = load_config("digits", tiny_codec_settings(tiny_codec, "nowhere"))
    codec = Codec.load(tiny_codec)
    space = CodecSpace(str(tiny_codec), codec.hash, 2, 4, (0.1, 0.0, -0.1, 0.2), (0.8, 1.0, 1.2, 0.9))
    parts = {part: random_network(config, stage) for part, stage in PARTS}
    return quiet(LeDiFlowPipeline(**parts, vae=codec.model, codec_space=space.to_dict()))


def test_in_codec_latents_the_photo_is_the_same_outside_after_decoding(coded, mask):
    """Eq. 7 in the latents of which any pixel is masked, then a paste that hides the codec's own error."""
    photo = np.random.default_rng(2).integers(60, 200, (16, 16, 3), dtype=np.uint8)
    mask[4, 5] = False
    out = coded.inpaint(photo, mask, num_images=2, **ONE_STEP)
    for image in out.images:
        assert np.array_equal(np.array(image)[~mask], photo[~mask])
        assert (np.array(image)[mask] != photo[mask]).mean() > 0.8
    assert out.nfe == {"encoder": 1, "decoder": 1, "flow": 1, "codec": 1}
    latents = coded.inpaint(photo, mask, output_type="latent", **ONE_STEP).images
    pixels = to_float(torch.from_numpy(photo).movedim(-1, 0))[None]
    known = torch.from_numpy(~mask).view(8, 2, 8, 2).all(3).all(1)
    expected = Codec(coded.vae).encode(pixels).mean
    torch.testing.assert_close(latents[..., known], expected[..., known], rtol=1e-4, atol=1e-5)
    assert (latents - expected)[..., ~known].abs().mean() > 0.01
    assert coded.reconstruct(photo).nfe == {"encoder": 1, "decoder": 1, "flow": 4, "codec": 1}


# Restyle, SDEdit


def test_restyle_starts_both_flows_on_the_way(pipe, y):
    out = pipe.restyle(
        y, strength=0.25, num_images=2, seed=3, solver="midpoint", steps=1, latent_steps=1, output_type="pt"
    )

    def half_step(network, state, told, t=0.75, h=0.25):
        middle = state + h / 2 * network(state, torch.tensor(t), told)
        return state + h * network(middle, torch.tensor(t + h / 2), told)

    z = pipe.auxiliary.standardize(pipe.encode(y[None]).mean)
    start = 0.25 * w_noise(pipe, 3, range(2), "r") + 0.75 * z
    moved = pipe.auxiliary.unstandardize(half_step(pipe.sampler, start, Conditions()))
    x = pipe.prior(moved).at(x_noise(pipe, 3, range(2)))
    end = half_step(pipe.flow, 0.25 * x + 0.75 * y, Conditions(z=moved))
    torch.testing.assert_close(out.images, end.clamp(-1, 1), rtol=0, atol=1e-4)
    assert out.nfe == {"encoder": 1, "sampler": 2, "decoder": 1, "flow": 2}


def test_restyle_leaves_all_or_nothing_at_its_ends(plain, pipe, mean_pipe, y):
    for pipeline in (plain, pipe, mean_pipe):
        still = pipeline.restyle(y, strength=0.0, output_type="pt")
        assert torch.equal(still.images, y[None]) and still.nfe["flow"] == 0
    fresh = plain.restyle(y, strength=1.0, seed=4, solver="midpoint", steps=2, output_type="pt").images
    end = by_midpoint(plain.flow, x_noise(plain, 4, [0]), Conditions())
    torch.testing.assert_close(fresh, end.clamp(-1, 1), rtol=0, atol=1e-5)
    assert mean_pipe.restyle(y, strength=0.5).nfe == {"encoder": 1, "sampler": 1, "decoder": 1, "flow": 1}
    with pytest.raises(UserError, match="from 0 to 1"):
        pipe.restyle(y, strength=2)


def test_classes_are_told_where_they_are_given(pipe, y):
    without, three = pipe.vary(y, 0.4, output_type="pt"), pipe.vary(y, 0.4, class_labels=3, output_type="pt")
    assert (without.images - three.images).abs().max() > 1e-3

"""The smallest diffusers pipelines of each kind, with random weights, and real code to save and load them."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    LDMPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

SIDE = 8  # of the latents that each base makes by default
FACTOR = 2  # of each codec
BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "sample_size": 16,
}


def autoencoder(seed, channels=4, **settings):
    torch.manual_seed(seed)
    return AutoencoderKL(latent_channels=channels, **BLOCKS, **settings).eval()


def tokenizer():
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "c</w>", "t</w>", "a", "c", "t"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=8)


def text_encoder(kind=CLIPTextModel, width=8, **settings):
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=width, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1, **settings,
    )  # fmt: skip
    return kind(config).eval()


def unet(cross, **settings):
    return UNet2DConditionModel(
        sample_size=SIDE, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross, attention_head_dim=4, **settings,
    ).eval()  # fmt: skip


def stable_diffusion(seed=0):
    return StableDiffusionPipeline(
        vae=autoencoder(seed, scaling_factor=0.18215), text_encoder=text_encoder(), tokenizer=tokenizer(),
        unet=unet(8), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def lcm(seed=0):
    pipe = stable_diffusion(seed)
    pipe.register_modules(scheduler=LCMScheduler.from_config(pipe.scheduler.config))
    return pipe


def sdxl(seed=0):
    return StableDiffusionXLPipeline(
        vae=autoencoder(
            seed + 10, scaling_factor=0.13025, latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 0.8, 1.0, 2.0],
        ),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, projection_dim=8),
        tokenizer=tokenizer(), tokenizer_2=tokenizer(),
        unet=unet(
            16, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 + 6 * 8,
        ),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
    )  # fmt: skip


def sd3(seed=0):
    projecting = {"kind": CLIPTextModelWithProjection, "projection_dim": 8}
    return StableDiffusion3Pipeline(
        vae=autoencoder(seed + 20, 16, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=text_encoder(**projecting), tokenizer=tokenizer(),
        text_encoder_2=text_encoder(**projecting), tokenizer_2=tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=SIDE, patch_size=2, in_channels=16, num_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
            pooled_projection_dim=16, out_channels=16, pos_embed_max_size=SIDE,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux(seed=0):
    t5 = T5Config(
        vocab_size=8, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )  # fmt: skip
    words = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("▁", -1.0),
        ("a", -2.0),
        ("c", -2.0),
        ("t", -2.0),
    ]
    return FluxPipeline(
        vae=autoencoder(seed + 30, 16, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=text_encoder(), tokenizer=tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=T5TokenizerFast(vocab=words, extra_ids=0),
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def unconditional(seed=0):
    torch.manual_seed(seed + 40)
    return LDMPipeline(
        vqvae=VQModel(
            latent_channels=3, num_vq_embeddings=16, scaling_factor=0.5,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), norm_num_groups=4,
        ).eval(),
        unet=UNet2DModel(
            sample_size=SIDE, in_channels=3, out_channels=3, block_out_channels=(8, 8), layers_per_block=1,
            norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=4,
        ).eval(),
        scheduler=DDIMScheduler(clip_sample=False),
    )  # fmt: skip


KINDS = {
    "sd": stable_diffusion,
    "lcm": lcm,
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "ldm": unconditional,
}


# what a call needs besides the prompt
SQUARE = {"height": SIDE * FACTOR, "width": SIDE * FACTOR}
REQUESTS = {"sd3": SQUARE, "flux": {**SQUARE, "max_sequence_length": 8}}


def save_and_load(kind, folder):
    """Build a base of a kind, always with the same weights, save it, and return what diffusers loads."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        KINDS[kind]().save_pretrained(folder)
    # what SD3 is asked to do without, diffusers wants to hear again
    without = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipe = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def request(kind, **settings):
    """The smallest request: two steps, and a prompt where there is one."""
    prompt = {} if kind == "ldm" else {"prompt": "a cat"}
    return {"num_inference_steps": 2, **prompt, **REQUESTS.get(kind, {}), **settings}

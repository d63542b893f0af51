"""The smallest frozen text encoders of each kind, with random weights and tokenizers that know cats."""

import torch
from tiny_bases import flux, text_encoder, tokenizer
from transformers import CLIPConfig, CLIPModel

VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def write_clip(folder, seed=0, *, whole=False):
    """A CLIP text model of 8 tokens and 8 numbers; `whole` is CLIP with its eyes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = text_encoder()
        if whole:
            config = model.config.to_dict()
            model = CLIPModel(CLIPConfig(text_config=config, vision_config=VISION, projection_dim=8))
        # as they are made, words hardly differ
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_t5(folder, seed=0):
    """A T5 encoder of 16 numbers."""
    with torch.random.fork_rng(devices=[]):
        pipe = flux(seed)
    pipe.text_encoder_2.save_pretrained(folder)
    pipe.tokenizer_2.save_pretrained(folder)
    return folder

"""A tiny, real diffusers pipeline: UMT5, VAE and Wan with random weights, made without a network."""

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_DIM = 24
ASKED = ["a cat runs", "two old dogs sleep under a tree"]
NEGATIVE = "blurry dogs"


def tokenizer() -> PreTrainedTokenizerFast:
    words = sorted({word for prompt in [*ASKED, NEGATIVE] for word in prompt.split()})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    words = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def transformer(**changes) -> WanTransformer3DModel:
    torch.manual_seed(1)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 2,
    }
    return WanTransformer3DModel(**{**config, **changes}).eval()


def parts() -> dict:
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=20, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0
    )
    vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    return {
        "tokenizer": tokenizer(),
        "text_encoder": UMT5EncoderModel(text).eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }

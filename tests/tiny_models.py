"""Tiny models with random weights: in the files that encoders are read from, those of transformers and ONNX, and pipelines of diffusers."""

from __future__ import annotations

import json
import string
import warnings

import torch

WORDS = ["a", "red", "pistol", "hair", "dryer", "on", "table", "knife", "the", "photo", "of", "toy"]
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}


def write_clip(folder):
    """As openai/clip-vit-base-patch32: vocab.json, merges.txt and the processor of 2021, whose sizes are plain numbers."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    letters = [*string.ascii_lowercase, *",.'-"]
    ids = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(ids))}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    start, end = vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]
    text = TOWER | {"max_position_embeddings": 77, "vocab_size": len(vocabulary), "bos_token_id": start, "eos_token_id": end}
    CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)).save_pretrained(folder)
    processor = {
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 32,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def write_siglip(folder):
    """As google/siglip-base-patch16-224: a SentencePiece model."""
    import sentencepiece
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    (folder / "words.txt").write_text("\n".join([" ".join(WORDS), *WORDS] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "words.txt"), model_prefix=str(folder / "spiece"), vocab_size=30, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    (folder / "words.txt").unlink()
    config = {
        "tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>", "do_lower_case": True,
        "model_input_names": ["input_ids"], "model_max_length": 64,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = TOWER | {"max_position_embeddings": 16, "vocab_size": 30, "projection_size": 32}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_siglip2(folder):
    """As google/siglip2-base-patch16-224: a model of type siglip with Gemma's tokenizer, and bilinear resizing."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    letters = ["▁", *sorted({letter for word in WORDS for letter in word})]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_special_tokens(tokens[:5])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True, "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<pad>", "unk_token": "<unk>", "padding_side": "right", "model_input_names": ["input_ids"],
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    text = TOWER | {"max_position_embeddings": 40, "vocab_size": len(tokens), "projection_size": 32}
    SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)).save_pretrained(folder)
    SiglipImageProcessor(size={"height": 32, "width": 32}, resample=2).save_pretrained(folder)


def write_dinov2(folder):
    """As facebook/dinov2-small: resized to more than what is cropped."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(**(VISION | {"image_size": 64}), mlp_ratio=2)
    Dinov2Model(config).save_pretrained(folder)
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    BitImageProcessor(size={"shortest_edge": 38}, crop_size={"height": 32, "width": 32}, resample=3, **imagenet).save_pretrained(folder)


def write_dinov2_with_registers(folder):
    from transformers import BitImageProcessor, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VISION, mlp_ratio=2, num_register_tokens=2)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 37}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def write_dinov3_vit(folder):
    """As facebook/dinov3-vits16-pretrain-lvd1689m, whose processor divides before it resizes."""
    from transformers import DINOv3ViTConfig, DINOv3ViTImageProcessor, DINOv3ViTModel

    DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=2)).save_pretrained(folder)
    DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def write_dinov3_convnext(folder):
    from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel, DINOv3ViTImageProcessor

    DINOv3ConvNextModel(DINOv3ConvNextConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])).save_pretrained(folder)
    DINOv3ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


WITH_TEXTS = {"clip": write_clip, "siglip": write_siglip, "siglip2": write_siglip2}
WITHOUT_TEXTS = {
    "dinov2": write_dinov2,
    "dinov2_with_registers": write_dinov2_with_registers,
    "dinov3_vit": write_dinov3_vit,
    "dinov3_convnext": write_dinov3_convnext,
}
FAMILIES = WITH_TEXTS | WITHOUT_TEXTS


# --- ONNX ---------------------------------------------------------------------------------------------------------------

STATED = {"size": 32, "mean": [0.5, 0.4, 0.45], "std": [0.25, 0.3, 0.27], "interpolation": "bicubic", "resize_mode": "shortest"}


class Net(torch.nn.Module):
    """A small random network with two outputs."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 4, stride=4), torch.nn.GELU(), torch.nn.Conv2d(12, 8, 2, stride=2))

    def forward(self, pixels):
        features = self.layers(pixels)
        return features.flatten(2).transpose(1, 2), features.mean(dim=(2, 3))


def write_onnx(path):
    """A network and its file, as torch.onnx writes it, with a dynamic batch; returns the network."""
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        torch.onnx.export(
            net, (torch.zeros(2, 3, 32, 32),), path, dynamo=True, external_data=False, verbose=False, input_names=["pixels"],
            output_names=["patches", "pooled"], dynamic_shapes={"pixels": {0: torch.export.Dim("batch", min=1, max=1024)}},
        )  # fmt: skip
    return net


# --- diffusers ---------------------------------------------------------------------------------------------------------


def alphabet():
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def clip(with_projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokens = [*alphabet(), *(f"{letter}</w>" for letter in alphabet()), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    n = len(tokens)
    config = CLIPTextConfig(
        vocab_size=n,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=n - 2,
        eos_token_id=n - 1,
        pad_token_id=n - 1,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config), tokenizer


def t5():
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)
    config = T5Config(vocab_size=len(pieces), d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=2, relative_attention_num_buckets=8)
    return T5EncoderModel(config), tokenizer


def qwen_vl():
    import transformers

    tokenizer = transformers.Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(alphabet())}, merges=[])
    named = ["im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    tokenizer.add_tokens([f"<|{name}|>" for name in named], special_tokens=True)
    start, end, vision_start, vision_end, image, video = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in named)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "rope_theta": 1e6,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=vision_start,
        vision_end_token_id=vision_end,
    )
    images = transformers.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
    processor = transformers.Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer, video_processor=transformers.Qwen2VLVideoProcessor()
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor


def autoencoder(channels=4, **more):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        force_upcast=False,
        **more,
    )


def unet(channels, text_width, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=4,
        **more,
    )


def stable_diffusion(class_name, channels, **more):
    import diffusers

    text, tokenizer = clip()
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False} | more
    # this scheduler draws noise at every step, so that a generator shared within a batch would show
    scheduler = diffusers.EulerAncestralDiscreteScheduler(steps_offset=1)
    return getattr(diffusers, class_name)(
        vae=autoencoder(), text_encoder=text, tokenizer=tokenizer, unet=unet(channels, 32), scheduler=scheduler, **parts
    )


def stable_diffusion_xl(class_name, channels):
    import diffusers

    text, tokenizer = clip()
    text_2, _ = clip(with_projection=True)
    times = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8}
    return getattr(diffusers, class_name)(
        vae=autoencoder(),
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(channels, 64, use_linear_projection=True, **times),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(steps_offset=1),
    )


def flux(class_name, channels):
    import diffusers

    text, tokenizer = clip()
    text_2, tokenizer_2 = t5()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=channels,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    return getattr(diffusers, class_name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=autoencoder(1, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=text,
        tokenizer=tokenizer,
        text_encoder_2=text_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def qwen(class_name):
    import diffusers

    text, tokenizer, processor = qwen_vl()
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return getattr(diffusers, class_name)(
        scheduler=scheduler, vae=vae, text_encoder=text, tokenizer=tokenizer, processor=processor, transformer=transformer
    )


PIPELINES = {
    "instruct_pix2pix": lambda: stable_diffusion("StableDiffusionInstructPix2PixPipeline", 8),
    "instruct_pix2pix_xl": lambda: stable_diffusion_xl("StableDiffusionXLInstructPix2PixPipeline", 8),
    "flux_kontext": lambda: flux("FluxKontextPipeline", 4),
    "qwen_image_edit": lambda: qwen("QwenImageEditPipeline"),
    "qwen_image_edit_plus": lambda: qwen("QwenImageEditPlusPipeline"),
    "inpaint": lambda: stable_diffusion("StableDiffusionInpaintPipeline", 9),
    "inpaint_xl": lambda: stable_diffusion_xl("StableDiffusionXLInpaintPipeline", 9),
    "text_to_image": lambda: stable_diffusion("StableDiffusionPipeline", 4),
    "flux_fill": lambda: flux("FluxFillPipeline", 4 + 4 + 4 * 4),
}


# --- vision-language models, in the files of transformers -----------------------------------------------------------------

SPOKEN = ["user", "assistant", ":", "safe", "unsafe", "yes", "no", "un", "Is", "this", "image", "or", "?", "red", "is", "it"]
SPECIAL = [
    "[PAD]", "[UNK]", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<global-img>", "<video>", "<row_1_col_1>", "<|image_pad|>",
    "<|vision_start|>", "<|vision_end|>", "<|video_pad|>", "<IMG_CONTEXT>", "<img>", "</img>", "<image_soft_token>", "<start_of_image>",
    "<end_of_image>",
]  # fmt: skip
VLM_WORDS = [*SPECIAL, *SPOKEN]
LANGUAGE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "vocab_size": len(VLM_WORDS), "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
SQUARE = {"height": 32, "width": 32}


def _tokenizer(**names):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VLM_WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=SPECIAL[4:], **names,
    )  # fmt: skip


def chat_template(image):
    """Of a model whose images stand where this text does."""
    return (
        "<s>{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %} assistant :{% endif %}"
    )


def _save(model, processor, folder):
    with torch.no_grad():  # states of a size as trained ones have, beside which a norm's epsilon is nothing
        model.get_input_embeddings().weight.mul_(20)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_smolvlm(folder):
    """As HuggingFaceTB/SmolVLM-256M-Instruct."""
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    side = {"longest_edge": 32}
    config = SmolVLMConfig(
        text_config=LANGUAGE | {"model_type": "llama"}, vision_config=VISION, scale_factor=2, image_token_id=VLM_WORDS.index("<image>"),
        pad_token_id=0,
    )  # fmt: skip
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 128}, max_image_size=side),
        _tokenizer(),
        SmolVLMVideoProcessor(size=side, max_image_size=side, video_sampling={"fps": 1, "max_frames": 4, "video_size": side}),
        image_seq_len=4,
        chat_template=chat_template("<image>"),
    )
    _save(SmolVLMForConditionalGeneration(config), processor, folder)


def write_qwen_vl(folder):
    """As Qwen/Qwen2.5-VL-3B-Instruct: patches in a row, and positions in three dimensions."""
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8, "out_hidden_size": 32,
        "fullatt_block_indexes": [1], "window_size": 32,
    }  # fmt: skip
    marks = {name: VLM_WORDS.index(f"<|{mark}|>") for name, mark in {
        "image_token_id": "image_pad", "video_token_id": "video_pad", "vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end",
    }.items()}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config=LANGUAGE | {"rope_parameters": rope}, vision_config=vision, bos_token_id=2, eos_token_id=3, **marks
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(patch_size=8, min_pixels=256, max_pixels=4096),
        _tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
        Qwen2VLVideoProcessor(patch_size=8),
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    _save(Qwen2_5_VLForConditionalGeneration(config), processor, folder)


def write_paligemma(folder):
    """As google/paligemma2-3b-mix-224: Gemma's norms, and logits that are capped."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration, PaliGemmaProcessor, SiglipImageProcessor

    images = SiglipImageProcessor(size=SQUARE)
    images.image_seq_length = 16
    config = PaliGemmaConfig(
        text_config=LANGUAGE | {"model_type": "gemma2", "head_dim": 16, "sliding_window": 64},
        vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32},
        image_token_index=VLM_WORDS.index("<image>"), projection_dim=32,
    )  # fmt: skip
    processor = PaliGemmaProcessor(images, _tokenizer(), chat_template=chat_template("<image>"))
    _save(PaliGemmaForConditionalGeneration(config), processor, folder)


def write_internvl(folder):
    """As OpenGVLab/InternVL3-1B-hf."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    config = InternVLConfig(
        text_config=LANGUAGE | {"model_type": "qwen2"}, vision_config=VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=VLM_WORDS.index("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=SQUARE), _tokenizer(**names), InternVLVideoProcessor(size=SQUARE), image_seq_length=4,
        chat_template=chat_template("<IMG_CONTEXT>"),
    )  # fmt: skip
    _save(InternVLForConditionalGeneration(config), processor, folder)


def write_llava(folder):
    """As llava-hf/llava-1.5-7b-hf: a CLIP whose class token is left out."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    config = LlavaConfig(
        text_config=LANGUAGE | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=VLM_WORDS.index("<image>"), vision_feature_layer=-1,
    )  # fmt: skip
    processor = LlavaProcessor(
        CLIPImageProcessor(size=SQUARE, crop_size=SQUARE, do_center_crop=False), _tokenizer(), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=chat_template("<image>"),
    )  # fmt: skip
    _save(LlavaForConditionalGeneration(config), processor, folder)


VLMS = {"llava": write_llava, "smolvlm": write_smolvlm, "qwen_vl": write_qwen_vl, "paligemma": write_paligemma, "internvl": write_internvl}

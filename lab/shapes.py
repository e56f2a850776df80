"""The sizes of Qwen2.5-VL, written out: their configurations need no checkpoint and no network."""

from harness.flags import UserError

from transformers import AutoConfig, PreTrainedConfig, Qwen2_5_VLConfig

# hidden size, layers, heads, heads of keys and values, width of the MLP, vocabulary; width of the vision tower's MLP
SHAPES = {
    "3B": (2048, 36, 16, 2, 11_008, 151_936, 3420),
    "7B": (3584, 28, 28, 4, 18_944, 152_064, 3420),
    "32B": (5120, 64, 40, 8, 27_648, 152_064, 3456),
    "72B": (8192, 80, 64, 8, 29_568, 152_064, 3456),
}


def shape_config(shape: str) -> Qwen2_5_VLConfig:
    """The configuration of Qwen2.5-VL in one of these sizes. Its special tokens have Qwen's ids."""
    hidden, layers, heads, key_heads, width, vocabulary, vision_width = SHAPES[shape]
    text = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=width,
        vocab_size=vocabulary,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    )
    # The other defaults are Qwen's: 32 blocks, full attention in four of them, windows of 112, patches of 14 pixels.
    vision = dict(hidden_size=1280, intermediate_size=vision_width, out_hidden_size=hidden)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=shape == "3B")


def config_of(name: str) -> PreTrainedConfig:
    """The configuration of a size, of a folder in the hub's layout, or of a model on the hub. UserError if none."""
    if name in SHAPES:
        return shape_config(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{name} is none of {', '.join(SHAPES)}, and no model that can be read: {reason}") from None

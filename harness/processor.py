"""What turns texts and pictures into a model's inputs: tokenizer and image processor, as a checkpoint ships them."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator

from harness.flags import INSTRUCTION, UserError, of_the_world

from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLProcessor


class Processor(Qwen2_5_VLProcessor):
    """Qwen2_5_VLProcessor without its video half, the only part of it that demands torchvision.

    system_prompt and instruction: what a prompt begins with, and what stands behind its problem.
    """

    system_prompt = ""
    instruction = INSTRUCTION

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)


@contextlib.contextmanager
def loading(name: str, what: str = "model", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Makes one line, a UserError, of whatever transformers says when it cannot load the model `name`.

    also: further errors that are taken for its words.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, *also) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{what} {name} is no folder or name of a model that can be loaded: {reason}") from None


def make_processor(folder: str, args: Namespace | None) -> Processor:
    """The processor of the checkpoint in `folder` (or of this name on the hub), with the pixel budget and the texts of
    a prompt that `args` asks for (None: the defaults)."""
    args = args or of_the_world()
    image_processor = AutoImageProcessor.from_pretrained(folder)
    image_processor.size = dict(shortest_edge=args.min_pixels, longest_edge=args.max_pixels)  # trap: pixel budget
    processor = Processor(image_processor, AutoTokenizer.from_pretrained(folder))
    processor.system_prompt = args.system_prompt
    processor.instruction = args.instruction
    return processor

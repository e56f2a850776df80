"""What turns texts and pictures into a model's inputs: tokenizer and image processor, as a checkpoint ships them."""

import contextlib
from argparse import Namespace
from collections.abc import Iterator

from harness.flags import INSTRUCTION, UserError, of_the_world

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

SIDE = 28  # pixels along a visual token of Qwen2.5-VL: 2 patches of 14
ANY_WORDS = "How many dogs are in picture 1?"  # of which every tokenizer knows a part


class Processor(Qwen2_5_VLProcessor):
    """Qwen2_5_VLProcessor without its video half, the only part of it that demands torchvision.

    system_prompt and instruction: what a prompt begins with, and what stands after its problem.
    """

    system_prompt = ""
    instruction = INSTRUCTION

    def __init__(self, image_processor=None, tokenizer=None):
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)


@contextlib.contextmanager
def loading(name: str, what: str = "model", also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Makes one line, a UserError, of whatever transformers says when it cannot load the model `name`.

    also: further exception types to treat the same way.
    """
    try:
        yield
    except (OSError, ValueError, SafetensorError, StrictDataclassError, *also) as error:
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


def as_seen(problem: dict, args: Namespace) -> dict:
    """A problem with the `size` of its first picture as the processor resizes it: there an answer's box belongs.

    `encode` notes it too; this is for whoever grades what was not encoded.
    """
    first = problem["images"][0]
    height, width = smart_resize(
        first.height, first.width, factor=SIDE, min_pixels=args.min_pixels, max_pixels=args.max_pixels)
    return {**problem, "size": (width, height)}


def check_tokenizer(model: str, tokenizer: PreTrainedTokenizerBase, rows: int, chats: bool = True):
    """UserError for a tokenizer that does not fit its model. Where its files lack, transformers makes an empty one.

    model: what messages call it. rows: of the model's embedding. chats: whether it needs a chat template.
    """
    known = set(tokenizer(ANY_WORDS, add_special_tokens=False).input_ids) - set(tokenizer.all_special_ids)
    if not known:
        raise UserError(f"{model} has a tokenizer that knows no words; put the files of its own beside its weights")
    if len(tokenizer) > rows:
        raise UserError(f"{model} has a tokenizer of {len(tokenizer)} tokens and weights for {rows}; put the files of "
                        "its own beside its weights")
    if chats and tokenizer.chat_template is None:
        raise UserError(f"{model} has no chat template, which says where a picture stands; put its own beside its "
                        "weights")

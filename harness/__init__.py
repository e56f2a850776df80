"""What surrounds a run and is in no paper: flags, processes, checkpoints, sharding, data sets, parsed answers.

    flags        the values of a script's flags, and where they come from
    run          processes, folder, log, checkpoints
    disk         writing to a disk that may be full
    memory       whether a model fits, before it is loaded
    sharding     a model split over processes
    rollout      answers and what they answer, as data
    updates      which answers share a forward pass, and what becomes of a loss
    problems     data sets by name or by path, checked row by row
    rows         one row of a data set: columns, pictures, options
    processor    tokenizer and image processor, as a checkpoint ships them
    prompts      what a prompt is made of; all prompts checked before a run begins
    traces       answers that were written elsewhere
    answers      reading an answer; when two answers mean the same
    reward_model what an answer in free text is worth, by a model that was trained to say so
    embedding    texts as vectors
    phrases      phrases of hesitation in an answer
    threads      cores that other processes need too
    selections   what VEPO's choice of tokens is compared with
    attention    how the tokens of packed rows look at each other
    cache        the KV cache of sampling, and how many answers have room in it
    diagnostics  what a run tells of itself beyond its paper
"""

import os

# A KV cache that grows and loses rows keeps asking a GPU for memory in new sizes. Without expandable segments that
# fragments the free memory into pieces that are too small. Torch reads this variable when it is imported, so the
# project's own modules are imported before torch.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

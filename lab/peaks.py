"""How far lab/plan.py is off: peaks of memory, measured on a CPU for small shapes, beside what the plan says.

    python lab/peaks.py          a few minutes; prints a table, writes results/peaks.json

Each peak is measured in a process of its own: VmHWM of Linux's /proc, above what the process held before it had a
model. The steps are those of a run: two passes of an update with Adam's moments there, or a wave in which no answer
ends. The C library is told to give memory back at once; otherwise what it holds on to would be measured too.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, Python looks in lab/, not in the root

import common
from common import Policy, find_model, load_policy, read, sample, token_logps
from harness import memory
from harness.flags import Parser
from harness.run import write_atomically
from lab import bench, plan

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, GenerationConfig, Qwen2_5_VLConfig

# phase, hidden size, layers, width of the MLP, vocabulary, cells along a picture's side, T, problems
SHAPES = (
    ("updating", 512, 8, 1536, 2000, 16, 256, 1),
    ("updating", 512, 4, 512, 2000, 16, 256, 1),
    ("updating", 1024, 4, 2048, 2000, 12, 192, 1),
    ("updating", 512, 4, 4096, 2000, 16, 128, 1),
    ("updating", 512, 8, 1536, 40_000, 16, 256, 1),
    ("sampling", 512, 8, 1536, 2000, 16, 128, 8),
    ("sampling", 512, 8, 1536, 40_000, 8, 32, 8),
    ("sampling", 512, 16, 1536, 2000, 4, 256, 8),
)
G = 8  # answers to a problem


def config_of(tokenizer, hidden, *, layers, width, vocabulary):
    """A Qwen2.5-VL of this shape with the tabletop's special tokens."""
    text = dict(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        intermediate_size=width,
        vocab_size=vocabulary,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]),
    )
    vision = dict(
        hidden_size=hidden // 2, num_heads=hidden // 64, depth=4, intermediate_size=hidden, out_hidden_size=hidden,
        fullatt_block_indexes=[3])
    ids = tokenizer.convert_tokens_to_ids
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )


def untrained(config, folder, processor):
    """The policy of a run with random weights, and its optimizer with its moments."""
    policy = Policy.of(AutoModelForImageTextToText.from_config(config, dtype=torch.float32))
    policy.generation_config = GenerationConfig.from_pretrained(folder)
    policy.set_vocabulary(processor.tokenizer)
    policy.vocabulary = config.get_text_config().vocab_size
    policy.requires_grad_(True)
    policy.model.visual.requires_grad_(False)
    policy.train()
    policy.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(common.trained_weights(policy), lr=1e-6)
    tiny = bench.invent(processor, bench.noise_problems(1, 56**2), 2, 4)
    read(token_logps, tiny, policy).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return policy, optimizer


def measure(shape):
    """One peak, and what the plan says of it, in bytes; and S, the tokens of its prompt."""
    phase, hidden, layers, width, vocabulary, cells, T, problems = shape
    torch.set_num_threads(1)
    folder = find_model("toy")
    toy, processor = load_policy("toy")
    processor.image_processor.size = dict(shortest_edge=28**2, longest_edge=10**7)
    config = config_of(processor.tokenizer, hidden, layers=layers, width=width, vocabulary=vocabulary)
    asked = bench.noise_problems(problems, (28 * cells) ** 2)
    # What is loaded at the first call of anything does not belong to the model.
    read(token_logps, bench.invent(processor, asked[:1], 2, 4), toy)
    del toy
    before = bench.memory_gb("VmRSS")
    policy, optimizer = untrained(config, folder, processor)
    rollout = bench.invent(processor, asked[:1], G, T)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    if phase == "updating":
        for _ in range(2):
            read(token_logps, rollout, policy).sum().backward()
        optimizer.step()
    else:
        policy.banned = policy.banned + policy.ends
        sample(policy, processor, asked, G, seed=(1, "peaks"), max_completion_length=T, sample_batch_size=10**6)
    peak = (bench.memory_gb("VmHWM") - before) * plan.GB
    S = len(rollout.prompts.ids[0])
    return dict(S=S, measured=peak, planned=planned(config, shape, S))


def planned(config, shape, S):
    """What the plan says of a shape, in bytes. S: its prompt's tokens."""
    phase, *_, cells, T, problems = shape
    work = memory.Work(S=S, patches=4 * cells**2, T=T, T_most=T, G=G, wave=problems * G, row=G)
    machine = memory.Machine(gpus=1, memory=0, number=memory.FP32, split=False)
    needed = dict(sampling=memory.sampling, updating=memory.updating)[phase]
    return sum(needed(config, memory.count_weights(config), work, machine).values())


def measured_alone(shape):
    """`measure` in a process of its own, and the ratio of both: planned by measured."""
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", OMP_NUM_THREADS="1", TQDM_DISABLE="1")
    words = [sys.executable, str(Path(__file__).resolve()), "--shape", json.dumps(shape)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | dict(ratio=found["planned"] / found["measured"])


def main(args):
    if args.shape:
        print(json.dumps(measure(json.loads(args.shape))))
        return
    rows = []
    for shape in tqdm(SHAPES, desc="peaks"):
        rows.append(dict(shape=shape) | measured_alone(shape))
    print(f"{'phase':10}{'hidden':>8}{'layers':>8}{'MLP':>8}{'V':>8}{'cells':>8}{'T':>8}{'P':>8}"
          f"{'measured':>10}{'planned':>10}{'ratio':>8}")
    for row in rows:
        phase, *numbers = row["shape"]
        cells = "".join(f"{number:8}" for number in numbers)
        print(f"{phase:10}{cells}{row['measured'] / plan.GB:10.3f}{row['planned'] / plan.GB:10.3f}{row['ratio']:8.2f}")
    write_atomically(args.output, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    parser = Parser("peaks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="measure only this one, as json, in this process")
    parser.add_argument("--output", default="results/peaks.json", help="where the numbers go")
    main(parser.parse_args())

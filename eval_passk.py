"""pass@k and what goes with it, for one or several models on one or several data sets.

    pass@k = 1 − C(n − c, k) / C(n, k)      per problem, from n samples of which c are right; mean over problems   (1)

Chen et al. 2021, arXiv 2107.03374: unbiased for every k ≤ n; k > n is an error. Beside it: acc@1, the greedy answer;
the number of distinct final answers among the n; the entropy of the full vocabulary, the length of an answer and the
share of truncated ones; everything per verifier too. Intervals are 95% percentile bootstraps over problems (10,000
draws); a contrast with the first model resamples the same problems for both.

An answer counts as right when its reward is 1; a box when its IoU is at least .5; a judged answer when above 0.

Every answer depends on (seed, problem, its number) alone and is kept in samples.jsonl: a stopped evaluation goes on
where it was, one with another model added measures that model only.

    python eval_passk.py --model toy,runs/grpo-toy-1 --dataset toy@test,toy@ood
    accelerate launch eval_passk.py --model Qwen/Qwen2.5-VL-7B-Instruct,my/checkpoint --dataset hiyouga/geometry3k@test

Writes samples.jsonl, eval.json and pass_at_k.png into --output_dir, and prints a table.
"""

import json
import os

import numpy as np
from tqdm import tqdm

from common import (
    MODEL_FLAGS, Run, UserError, bootstrap, check_prompts, final_answer, format_reward, is_right, launch, load_policy,
    load_problems, sample, write_atomically,
)

# --- the algorithm ----------------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Eq. (1) as the product over i < k of (n − c − i)/(n − i). n, c numbers or arrays of one shape, k a number."""
    n, c = np.asarray(n, dtype=float), np.asarray(c, dtype=float)
    if k < 1 or (k > n).any() or (c < 0).any() or (c > n).any():
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, not n = {n}, c = {c}")
    i = np.arange(k)
    missed = np.prod(np.maximum(n[..., None] - c[..., None] - i, 0) / (n[..., None] - i), axis=-1)
    return 1 - missed if missed.ndim else float(1 - missed)


def measures(row, ks):
    """The numbers of one problem: pass@k for each k, then the rest. `row` is a line of samples.jsonl."""
    n = len(row["right"])
    numbers = {f"pass@{k}": pass_at_k(n, sum(row["right"]), k) for k in ks}
    return numbers | {
        "acc@1": float(row["greedy_right"]), "distinct": len(set(row["answers"]) - {None}),
        "format": np.mean(row["format"]), "entropy": sum(row["entropy"]) / sum(row["tokens"]),
        "length": np.mean(row["tokens"]), "truncated": np.mean(row["truncated"]),
    }


def summary(rows, ks):
    """{measure: [mean, low, high]} over problems, each with its bootstrap interval."""
    table = [measures(row, ks) for row in rows]
    return {name: bootstrap([numbers[name] for numbers in table]) for name in table[0]}


def contrast(rows, first_rows, ks):
    """{measure: [difference, low, high]} to the first model: the same problems are resampled for both (paired)."""
    ours, first = ({row["id"]: measures(row, ks) for row in some} for some in (rows, first_rows))
    return {name: bootstrap([ours[id][name] - first[id][name] for id in ours]) for name in next(iter(ours.values()))}


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(dataset="hiyouga/geometry3k@test")
TOY = dict(dataset="toy@test,toy@ood", max_completion_length=64, sample_batch_size=512)


def flags(parser):
    parser.add_argument("--dataset", help="data sets, with commas between: name@split[:count] or a path")
    parser.add_argument("--num_samples", type=int, default=16, help="n, answers sampled to each problem")
    parser.add_argument("--ks", default="1,2,4,8,16", help="the k of pass@k, with commas between")


def fingerprint(model):
    """Size and time of a local model's weights, so that answers of older weights are not taken for its own."""
    path = os.path.join(model, "model.safetensors.index.json")
    path = path if os.path.exists(path) else os.path.join(model, "model.safetensors")
    return f"{os.path.getsize(path)}-{os.path.getmtime(path)}" if os.path.exists(path) else model


def answer_all(run, model, name, problems, path, rows):
    """Samples what is not yet in `rows` (lines of samples.jsonl) and returns all of this model and data set."""
    args = run.args
    key = dict(model=model, weights=fingerprint(model), dataset=name, n=args.num_samples, temperature=args.temperature,
               max_completion_length=args.max_completion_length, max_pixels=args.max_pixels, seed=args.seed)
    rows = [row for row in rows if key.items() <= row.items()]
    done = {row["id"] for row in rows}
    left = [place for place, problem in enumerate(problems) if problem["id"] not in done]
    policy, processor = load_policy(model, run) if left else (None, None)
    if left:
        check_prompts(processor, (problems[place] for place in left), args)
    settings = dict(max_completion_length=args.max_completion_length, sample_batch_size=args.sample_batch_size)
    share = max(1, args.sample_batch_size // args.num_samples) * run.world
    for start in tqdm(range(0, len(left), share), desc=f"{model} on {name}", disable=not run.is_main):
        mine = [problems[place] for place in left[start:start + share][run.rank::run.world]]
        asked = mine or [problems[left[0]]]  # without a share it samples too: the weights are gathered by all
        many = sample(policy, processor, asked, args.num_samples, seed=(args.seed, "eval"),
                      temperature=args.temperature, **settings)
        greedy = sample(policy, processor, asked, 1, seed=(args.seed, "eval"), temperature=0, **settings)
        new = [key | row for row in rows_of(many, greedy)] if mine else []
        new = [row for theirs in run.gather(new) for row in theirs]
        run.append(path, new)
        rows += new
    wanted = {problem["id"] for problem in problems}
    return [row for row in rows if row["id"] in wanted]


def rows_of(many, greedy):
    """One line of samples.jsonl for each problem of a rollout and its greedy twin."""
    size = len(many) // len(many.prompts.problems)
    tokens, entropy = many.mask_BT.sum(1), (many.entropy_BT * many.mask_BT).sum(1)
    tokens_PG, entropy_PG, cut_PG = (x.view(-1, size).tolist() for x in (tokens, entropy, 1 - many.finished_B))
    texts_PG = [many.texts[b:b + size] for b in range(0, len(many), size)]
    return [dict(
        id=problem["id"], verifier=problem["verifier"], greedy=greedy.texts[p],
        greedy_right=is_right(problem, greedy.texts[p]), right=[is_right(problem, text) for text in texts_PG[p]],
        format=[format_reward(problem, text) for text in texts_PG[p]], answers=[final_answer(x) for x in texts_PG[p]],
        tokens=tokens_PG[p], entropy=entropy_PG[p], truncated=cut_PG[p], texts=texts_PG[p],
    ) for p, problem in enumerate(many.prompts.problems)]


def table(results, ks):
    """The results as text: a line for each model, data set and verifier."""
    names = [f"pass@{k}" for k in ks] + ["acc@1", "distinct", "entropy", "length", "truncated"]
    lines = ["{:28} {:22}".format("model", "problems") + "".join(f"{name:>10}" for name in names)]
    for entry in results:
        label = f"{entry['model']:28} {entry['dataset']:22}"
        lines += [label + "".join(f"{entry['measures'][name][0]:10.3f}" for name in names)]
        lines += [" " * 51 + "".join(f"{f'±{(high - low) / 2:.3f}':>10}" for _, low, high in
                                     (entry["measures"][name] for name in names))]
        lines += [f"{'':28}   {verifier:20}" + "".join(f"{part[name][0]:10.3f}" for name in names)
                  for verifier, part in entry["verifiers"].items()]
        for name in ("pass@1", f"pass@{ks[-1]}"):
            if "contrast" in entry:
                mean, low, high = entry["contrast"][name]
                lines += [f"{'':28}   {name} against {entry['against']}: {mean:+.3f}  [{low:+.3f}, {high:+.3f}]"]
    return "\n".join(lines)


def main(args):
    ks = sorted({int(k) for k in args.ks.split(",") if k.strip().isdigit() and 1 <= int(k) <= args.num_samples})
    if len(ks) != len(set(args.ks.split(","))):
        raise UserError(f"--ks {args.ks}: each k must be a whole number from 1 to --num_samples {args.num_samples}")
    run = Run(args)
    data = {name: load_problems(name) for name in args.dataset.split(",")}
    if not all(map(len, data.values())):
        raise UserError(f"--dataset {args.dataset}: there is nothing to measure in none; leave it out")
    os.makedirs(run.folder, exist_ok=True)
    path, results = run.path("samples.jsonl"), []
    for name, problems in data.items():
        kept = run.read_lines(path)
        first = None
        for model in args.model.split(","):
            rows = answer_all(run, model, name, problems, path, kept)
            kinds = sorted({row["verifier"] for row in rows})
            entry = dict(model=model, dataset=name, problems=len(rows), n=args.num_samples, seed=args.seed,
                         temperature=args.temperature, ks=ks, measures=summary(rows, ks),
                         verifiers={kind: summary([r for r in rows if r["verifier"] == kind], ks) for kind in kinds})
            if first:
                entry |= dict(against=args.model.split(",")[0], contrast=contrast(rows, first, ks))
            first = first or rows
            entry |= dict(zip(("pass_at_k", "low", "high"), zip(*(entry["measures"][f"pass@{k}"] for k in ks))))
            results.append(entry)
    if run.is_main:
        write_atomically(run.path("eval.json"), json.dumps(results, indent=1) + "\n")
        from lab import report  # drawn only here
        report.pass_at_k(results, run.path("pass_at_k.png"))
        print(table(results, ks))
        print(f"{args.num_samples} samples a problem at temperature {args.temperature}, seed {args.seed}; "
              f"± is half a 95% interval\nwritten: {', '.join(sorted(os.listdir(run.folder)))} in {run.folder}")
    run.accelerator.wait_for_everyone()  # a process that ends while another still works can abort on its way out


if __name__ == "__main__":
    launch("eval_passk", main, __doc__, flags, RECIPE, TOY, tables=(MODEL_FLAGS,))

"""pass@k and what goes with it, for one or several models on one or several data sets.

Why care: accuracy says how often one answer is right; pass@k says what a model can reach at all. RL often raises the
one and lowers the other.

    pass@k = 1 − C(n − c, k) / C(n, k)      per problem, from n samples of which c are right; mean over problems   (1)

It is the paper's equation (1) too (Chen et al. 2021, arXiv 2107.03374): unbiased for every k ≤ n; k > n is an error.
Also measured: acc@1, the accuracy of the greedy answer; the number of distinct final answers among the n; the
diversity of the n reasonings, their mean pairwise cosine distance as in mupo.py (--embedder); the entropy of the
next-token distribution; the length of an answer; its phrases of hesitation ("wait", "double-check":
harness/phrases.py); the share of truncated answers. Everything is given for each verifier too. Intervals are 95%
percentile bootstraps over problems (10,000 draws). A contrast with the first model resamples the same problems for
both; if that is the model before training, the contrast of `diversity` shows how far it fell.

An answer counts as right when its reward is 1; a box when its IoU is at least .5; a judged answer when above 0.

Every answer depends on (seed, problem, its number) alone and is kept in samples.jsonl: a stopped evaluation continues
where it stopped, and if a model is added, only that model is measured.

    python eval_passk.py --model toy,runs/grpo-toy-1 --dataset toy@test,toy@ood
    accelerate launch eval_passk.py --model Qwen/Qwen2.5-VL-7B-Instruct,my/checkpoint --dataset hiyouga/geometry3k@test

Prints a table, and writes samples.jsonl, eval.json and pictures into --output_dir: pass_at_k.png; diversity.png, acc@4
against diversity with a dot for each problem; for several models also phrases.png, how often each phrase of hesitation
occurs in an answer, and ways.png, the answers of all models to four problems, projected onto a plane.
"""

import json
import os

from common import (
    UserError,
    find_model,
    format_reward,
    is_right,
    load_judge,
    load_policy,
    load_problems,
    load_processor,
    report,
    sample,
)
from harness.answers import final_answer
from harness.disk import fingerprint
from harness.embedding import load_embedder, reasoning, spread
from harness.flags import MODEL_FLAGS, at_least, launch
from harness.phrases import PHRASES, hesitations
from harness.prompts import check_prompts, fitting, list_skipped, prompt_settings, sizes_in_words
from harness.run import Run, bootstrap, write_atomically

import numpy as np
from tqdm import tqdm

TRIES = 4  # the k of acc@4 in diversity.png
SHOWN = 4  # problems in ways.png

# --- the algorithm ----------------------------------------------------------------------------------------------------


def pass_at_k(n, c, k):
    """Eq. (1) as the product over i < k of (n − c − i)/(n − i). n, c numbers or arrays of one shape, k a number."""
    n = np.asarray(n, dtype=float)
    c = np.asarray(c, dtype=float)
    if k < 1 or (k > n).any() or (c < 0).any() or (c > n).any():  # trap: pass at k
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= c <= n, not n = {n}, c = {c}")
    i = np.arange(k)
    left = n[..., None] - i
    wrong_left = np.maximum(n[..., None] - c[..., None] - i, 0)
    missed = np.prod(wrong_left / left, axis=-1)
    if missed.ndim == 0:
        return float(1 - missed)
    return 1 - missed


def measures(row, ks):
    """The numbers of one problem: pass@k for each k, then the rest. `row` is a line of samples.jsonl."""
    n = len(row["right"])
    numbers = {f"pass@{k}": pass_at_k(n, sum(row["right"]), k) for k in ks}
    numbers["acc@1"] = float(row["greedy_right"])
    numbers["distinct"] = len(set(row["answers"]) - {None})
    numbers["format"] = np.mean(row["format"])
    numbers["entropy"] = sum(row["entropy"]) / sum(row["tokens"])
    numbers["length"] = np.mean(row["tokens"])
    numbers["truncated"] = np.mean(row["truncated"])
    numbers["hesitations"] = np.mean([hesitations(text).total() for text in row["texts"]])
    if "diversity" in row:
        numbers["diversity"] = row["diversity"]
    return numbers


def summary(rows, ks):
    """{measure: (mean, low, high)} over problems, each with its bootstrap interval."""
    table = [measures(row, ks) for row in rows]
    return {name: bootstrap([numbers[name] for numbers in table]) for name in table[0]}


def contrast(rows, first_rows, ks):
    """{measure: (difference, low, high)} to the first model: the same problems are resampled for both (paired)."""
    ours = {row["id"]: measures(row, ks) for row in rows}
    first = {row["id"]: measures(row, ks) for row in first_rows}
    names = next(iter(ours.values()))
    return {name: bootstrap([ours[id][name] - first[id][name] for id in ours]) for name in names}


# --- the run ----------------------------------------------------------------------------------------------------------

RECIPE = dict(dataset="hiyouga/geometry3k@test", min_pixels=262_144)
TOY = dict(
    dataset="toy@test,toy@ood", max_completion_length=64, sample_batch_size=512, min_pixels=784, embedder="ngrams",
)
TABLES = (MODEL_FLAGS,)


def flags(parser):
    parser.add_argument("--dataset", help="data sets, with commas between: name@split[:count] or a path")
    parser.add_argument("--num_samples", type=at_least(1), default=16, help="n, answers sampled to each problem")
    parser.add_argument("--ks", default="1,2,4,8,16", help="the k of pass@k, with commas between")
    parser.add_argument("--embedder", default="Qwen/Qwen3-Embedding-0.6B", help="a sentence-embedding model, or ngrams")


def answer_all(run, model, name, problems, *, judge):
    """The lines of samples.jsonl of one model on one data set. What is missing is sampled, and written there."""
    args = run.args
    settings = dict(max_completion_length=args.max_completion_length)
    key = dict(
        model=model, weights=fingerprint(find_model(model, run)), dataset=name, n=args.num_samples,
        temperature=args.temperature, **settings, **prompt_settings(args), seed=args.seed)
    if judge is not None:
        key |= dict(reward_model=args.reward_model, judge_weights=fingerprint(find_model(args.reward_model, run)))

    def prepare(left):
        policy, processor = load_policy(model, run)
        run.say(f"{model} on {name}: {sizes_in_words(check_prompts(processor, left, args))}")
        same = dict(settings, seed=(args.seed, "eval"), sample_batch_size=args.sample_batch_size)

        def answer(some):
            many = sample(policy, processor, some, args.num_samples, temperature=args.temperature, **same)
            greedy = sample(policy, processor, some, 1, temperature=0, **same)
            return rows_of(many, greedy, judge)

        return answer

    together = args.sample_batch_size or 1024
    share = max(1, together // args.num_samples)
    return run.answered(
        run.path("samples.jsonl"), key, problems, prepare, share=share, desc=f"{model} on {name}")


def rows_of(many, greedy, judge=None):
    """One line of samples.jsonl for each problem of a rollout and its greedy twin."""
    right_PG = many.score(is_right, judge).bool().tolist()
    greedy_right_P1 = greedy.score(is_right, judge).bool().tolist()
    tokens_B = many.mask_BT.sum(1)
    entropy_B = (many.entropy_BT * many.mask_BT).sum(1)
    cut_B = 1 - many.finished_B
    rows = []
    for p, answers in many.groups().items():
        problem = many.prompts.problems[p]
        texts = [many.texts[b] for b in answers]
        rows.append(dict(
            id=problem["id"],
            verifier=problem["verifier"],
            greedy=greedy.texts[p],
            greedy_right=greedy_right_P1[p][0],
            right=right_PG[p],
            format=[format_reward(problem, text) for text in texts],
            answers=[final_answer(text) for text in texts],
            tokens=tokens_B[answers].tolist(),
            entropy=entropy_B[answers].tolist(),
            truncated=cut_B[answers].tolist(),
            texts=texts,
        ))
    return rows


def add_diversity(run, rows, embed, desc):
    """Gives every row its `diversity`. Each process embeds its share of the rows."""
    found = []
    for row in tqdm(rows[run.rank::run.world], desc=desc, delay=5, leave=False, disable=not run.is_main):
        found.append(spread(embed([reasoning(text) for text in row["texts"]])))
    for rank, theirs in enumerate(run.gather(found)):
        for row, diversity in zip(rows[rank::run.world], theirs, strict=True):
            row["diversity"] = diversity


def result(args, model, name, rows, *, ks):
    """What eval.json says of one model on one data set: every measure, over all problems and for each verifier."""
    measured = summary(rows, ks)
    kinds = sorted({row["verifier"] for row in rows})
    curve = [measured[f"pass@{k}"] for k in ks]
    return dict(
        model=model,
        dataset=name,
        problems=len(rows),
        n=args.num_samples,
        seed=args.seed,
        temperature=args.temperature,
        ks=ks,
        measures=measured,
        verifiers={kind: summary([row for row in rows if row["verifier"] == kind], ks) for kind in kinds},
        phrases=phrases(rows),
        by_problem=by_problem(rows),
        pass_at_k=[mean for mean, _, _ in curve],
        low=[low for _, low, _ in curve],
        high=[high for _, _, high in curve],
    )


def by_problem(rows):
    """What diversity.png shows, a number for each problem in each list; {} where there is no diversity."""
    if "diversity" not in rows[0]:
        return {}
    tries = min(TRIES, len(rows[0]["right"]))
    return dict(
        id=[row["id"] for row in rows],
        tries=tries,
        acc=[pass_at_k(len(row["right"]), sum(row["right"]), tries) for row in rows],
        diversity=[row["diversity"] for row in rows],
    )


def ways(problems, rows_of, embed):
    """What ways.png shows of the first problems: the answers of every model, embedded together.

    rows_of: {model: lines of samples.jsonl}.
    """
    groups = []
    for place in range(min(SHOWN, len(problems))):
        problem = problems[place]
        theirs = {model: next(row for row in rows if row["id"] == problem["id"]) for model, rows in rows_of.items()}
        texts = {model: [reasoning(text) for text in row["texts"]] for model, row in theirs.items()}
        groups.append(dict(
            id=problem["id"], problem=problem["problem"], picture=problem["images"][0], texts=texts,
            right={model: row["right"] for model, row in theirs.items()},
            embeddings=embed([text for some in texts.values() for text in some])))  # n-grams need one list of words
    return groups


def phrases(rows):
    """{phrase of hesitation: how often it stands in an answer, on average}."""
    counts = [hesitations(text) for row in rows for text in row["texts"]]
    return {phrase: sum(count[phrase] for count in counts) / len(counts) for phrase in PHRASES}


def table(results, ks):
    """The results as text: a line for each model, data set and verifier."""
    names = [f"pass@{k}" for k in ks] + ["acc@1", "distinct", "diversity", "entropy", "length", "truncated"]
    names = [name for name in names if name in results[0]["measures"]]
    lines = [f"{'model':28} {'problems':22}" + "".join(f"{name:>10}" for name in names)]
    for entry in results:
        means = ""
        widths = ""
        for name in names:
            mean, low, high = entry["measures"][name]
            width = f"±{(high - low) / 2:.3f}"
            means += f"{mean:10.3f}"
            widths += f"{width:>10}"
        lines.append(f"{entry['model']:28} {entry['dataset']:22}{means}")
        lines.append(" " * 51 + widths)
        for verifier, part in entry["verifiers"].items():
            lines.append(f"{'':28}   {verifier:20}" + "".join(f"{part[name][0]:10.3f}" for name in names))
        lines += contrast_lines(entry, ks)
    return "\n".join(lines)


def contrast_lines(entry, ks):
    """What the table says of a model against the first one."""
    lines = []
    for name in (f"pass@{ks[0]}", f"pass@{ks[-1]}", "diversity"):
        if name in entry.get("contrast", {}):
            mean, low, high = entry["contrast"][name]
            lines.append(f"{'':28}   {name} against {entry['against']}: {mean:+.3f}  [{low:+.3f}, {high:+.3f}]")
    return lines


def read_ks(args):
    """The k of --ks, in order. UserError unless each is a whole number from 1 to --num_samples."""
    ks = set()
    for word in args.ks.split(","):
        if not word.strip().isdigit() or not 1 <= int(word) <= args.num_samples:
            raise UserError(f"--ks {args.ks}: each k must be a whole number from 1 to --num_samples {args.num_samples}")
        ks.add(int(word))
    return sorted(ks)


def main(args):
    ks = read_ks(args)
    run = Run(args)
    embed = load_embedder(args.embedder, run.device) if args.num_samples > 1 else None
    data = {name: load_problems(name, run) for name in args.dataset.split(",")}
    models = args.model.split(",")
    if args.skip_bad_rows:
        processor = load_processor(models[0], run)
        data = {name: fitting(run, processor, problems, name)[0] for name, problems in data.items()}
    for name, problems in data.items():
        if len(problems) == 0:
            raise UserError(f"--dataset {args.dataset}: there is nothing to measure in {name}; leave it out")
    judge = load_judge(args.reward_model, run)
    os.makedirs(run.folder, exist_ok=True)
    list_skipped(run)
    results = []
    groups = []
    for name, problems in data.items():
        rows = {model: answer_all(run, model, name, problems, judge=judge) for model in models}
        for model in models:
            if embed is not None:
                add_diversity(run, rows[model], embed, f"diversity of {model} on {name}")
            entry = result(args, model, name, rows[model], ks=ks)
            if model != models[0]:
                entry |= dict(against=models[0], contrast=contrast(rows[model], rows[models[0]], ks))
            results.append(entry)
        if run.is_main and embed is not None and not groups:
            groups = ways(problems, rows, embed)
    if run.is_main:
        write_atomically(run.path("eval.json"), json.dumps(results, indent=1) + "\n")
        report().measured(results, groups, run.folder)
        print(table(results, ks))
        print(f"{args.num_samples} samples a problem at temperature {args.temperature}, seed {args.seed}; "
              f"± is half a 95% interval\nwritten: {', '.join(sorted(os.listdir(run.folder)))} in {run.folder}")
    run.accelerator.wait_for_everyone()  # a process that ends while another still works can abort on its way out


if __name__ == "__main__":
    launch("eval_passk", main, flags, doc=__doc__, recipe=RECIPE, toy=TOY, tables=TABLES)

"""A run as something to look at: its curves, several runs side by side, pass@k, its tokens, its clusters, one page.

    python lab/report.py RUN_DIR                 writes RUN_DIR/curves.png and RUN_DIR/report.html, after vepo.py also
                                                 signals.png and tokens.html, after mupo.py also clusters.png
    python lab/report.py RUN_DIR RUN_DIR ...     writes overlay.png (--out elsewhere); runs that differ only in the
                                                 seed become one line, their mean, in a band from lowest to highest

This file holds the pages and the command line. lab/logs.py reads what a run wrote, lab/pictures.py draws it, and
lab/comparisons.py draws what eval_passk.py measured of several models.
A page needs no other file, no network and no script.
lab/ is a folder without __init__.py, which Python allows: `from lab import report` works from the root of the project.
"""

import base64
import html
import io
import json
import sys
from collections import Counter, namedtuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks in lab/, not in the root

from common import load_problems
from harness.flags import Parser, UserError
from lab.comparisons import measured
from lab.logs import NAMES, SAMPLE, SIGNALS, UNITS, about, load, load_args, load_last, load_metrics, logged, trace
from lab.pictures import (
    PALETTE,
    clusters,
    curves,
    dots,
    headline_of,
    overlay,
    pass_at_k,
    show,
    signals,
    token_text,
    write,
)

# What the scripts and the rest of lab/ take from here.
__all__ = ["PALETTE", "curves", "dots", "finish", "load", "measured", "overlay", "pass_at_k"]

# --- templates

# The start of both pages. Neither may run a script or fetch anything, whatever the model wrote.
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline';
base-uri 'none'; form-action 'none'">
<style>body {{ font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2.5rem max(1rem, 50vw - 30rem) }}
h1 {{ font-size: 1.5rem; margin: 0 }} h2 {{ font-size: 1.1rem; margin: 2.5rem 0 .5rem }} p {{ margin: .3rem 0 }}
.quiet {{ color: #767676; font-size: .87rem }} .tiny {{ image-rendering: pixelated }}
"""
# The page of a run.
PAGE = HEAD + """.curves {{ width: 100% }} .pair {{ display: flex; gap: 2rem }} a {{ color: #0072B2 }}
td {{ padding: .15rem 1.6rem .15rem 0; border-bottom: 1px solid #ececec }} section {{ flex: 1; min-width: 0 }}
article {{ border-top: 1px solid #ececec; padding: .8rem 0 }} article img {{ float: right; width: 7rem }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; clear: both; background: #f7f7f7; padding: .6rem }}
</style></head><body><h1>{title}</h1><p class="quiet">{about}</p><img class="curves" alt="curves" src="{picture}">
{more}<h2>In numbers, start and end</h2><table>{numbers}</table>
<h2>What it answered, early and late</h2><div class="pair"><section>{early}</section><section>{late}</section></div>
<h2>Flags</h2><pre>{flags}</pre></body></html>"""
# A sample on the page of a run.
CARD = """<article>{picture}<p class="quiet">step {step}, problem {id}, reward <b>{reward}</b></p><p>{problem}</p>
<p class="quiet">right answer: {answer}</p><pre>{text}</pre></article>"""
# A picture below the curves.
MORE = '<h2>{title}</h2><img class="curves" alt="{title}" src="{picture}">{link}'
# The page of the tokens. Radio buttons and sibling selectors switch the shade, so that the page needs no script.
TOKENS = HEAD + """input {{ position: fixed; opacity: 0 }} .picture {{ flex: 0 0 10.5rem }}
.picture:empty {{ display: none }} .picture img {{ width: 100% }} section {{ min-width: 0 }}
nav {{ position: sticky; top: 0; background: white; padding: .7rem 0; border-bottom: 1px solid #a0a0a0 }}
label {{ cursor: pointer; padding: .15rem .8rem; border-radius: 1rem }} nav p {{ display: none; margin: .5rem .8rem 0 }}
nav i {{ display: inline-block; width: 10rem; height: .7rem; border: 1px solid #ececec; margin: 0 .3rem;
background: linear-gradient(to right, transparent, rgb(var(--hue) / .7)) }}
article {{ display: flex; gap: 1.5rem; border-bottom: 1px solid #ececec; padding: 1.2rem 0 }}
.tokens {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2 }} .tokens span {{ padding: .15rem 0;
background: rgb(var(--hue) / calc(.7 * var(--shade))); border-radius: 3px; margin: 0 .5px }}
.kept {{ text-decoration: underline 2px #1a1a1a; text-underline-offset: 4px }}
{rules}</style></head><body><h1>{title}</h1><p class="quiet">{about}</p>
<p>Shaded: the value chosen below. <span class="kept">Underlined</span>: kept, the tokens that carry the gradient.
Hover over a token for its numbers.</p>{buttons}<nav>{scales}</nav>{answers}</body></html>"""
# An answer on the page of the tokens.
ANSWER = """<article><div class="picture">{picture}</div><section><p class="quiet">problem {id}</p><p>{problem}</p>
<div class="tokens">{tokens}</div></section></article>"""
# The rules of one shade.
RULE = """#{key}:checked ~ * {{ --hue: {hue} }} #{key}:checked ~ article span {{ --shade: var(--{key}) }}
#{key}:checked ~ nav .{key} {{ display: block }} #{key}:checked ~ nav [for={key}] {{ background: rgb({hue} / .5) }}
#{key}:focus-visible ~ nav [for={key}] {{ outline: 2px solid #1a1a1a }}
"""

# --- pieces of a page

TINY = 160  # pixels; a smaller picture is shown enlarged
LARGE = (448, 448)  # pixels; a larger picture is made smaller
Shade = namedtuple("Shade", "name unit hue meaning")
SHADES = {  # the signals of a token that can be shown
    "jsd": Shade("JSD", " nats", "230 159 0", "how far a noised picture moves the prediction"),
    "entropy": Shade("Entropy", " nats", "86 180 233", "how much the policy hesitates"),
    "delta_entropy": Shade("|ΔH|", " nats", "0 158 115", "how much a noised picture changes the entropy"),
    "score": Shade("Score", "", "204 121 167", "combined from the three; the highest are kept"),
}


def data_uri(png):
    """The bytes of a PNG as the address of a picture, so that the page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def save_page(path, text):
    """Writes a page; returns its path. JSON can carry half a surrogate pair, UTF-8 cannot: it becomes "?"."""
    return write(path, text.encode("utf-8", errors="replace"))


def numbers_row(rows, key):
    """A metric's start and end, with the interval where there is one, as a row of the table."""
    found = trace([rows], key)
    cells = [NAMES[key]]
    for i in (0, -1):
        value = show(found.mean[i], UNITS[key])
        low = show(found.low[i], UNITS[key])
        high = show(found.high[i], UNITS[key])
        cells.append(f"{value} [{low}, {high}]" if low != high else value)
    cells.append(UNITS[key].strip("%"))
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def picture_tag(problem_id, pictures):
    """A problem's picture as HTML, nothing where it is not given. A tiny one is enlarged with its pixels sharp."""
    if problem_id not in pictures:
        return ""
    small = pictures[problem_id].convert("RGB")
    small.thumbnail(LARGE)
    png = io.BytesIO()
    small.save(png, "PNG")
    size = "tiny" if max(small.size) <= TINY else "large"
    return f'<img class="{size}" alt="the picture of the problem" src="{data_uri(png.getvalue())}">'


def card(sample, pictures):
    """One answer as HTML. What a model wrote may be hostile: every value is escaped."""
    values = {key: html.escape(str(sample[key])) for key in SAMPLE}
    return CARD.format(picture=picture_tag(sample["id"], pictures), **values)


# --- the page of the tokens


def tokens(output_dir, pictures=None):
    """Shows up to 16 answers of signals.jsonl, each token shaded by its signals, in output_dir/tokens.html; its path.

    pictures: {problem id: PIL image}; the answers to these problems come first.
    """
    source, rows = load_last(output_dir, "signals.jsonl", SIGNALS)
    pictures = pictures or {}
    rows = choose_answers(rows, pictures)
    tops = {key: highest(rows, key) for key in SHADES}
    text = TOKENS.format(
        title=f"{len(rows)} answers, token by token",
        about=html.escape(source),
        rules="".join(RULE.format(key=key, hue=shade.hue) for key, shade in SHADES.items()),
        buttons="".join(button(key) for key in SHADES),
        scales=scales(tops),
        answers="".join(answer_html(row, tops, pictures) for row in rows),
    )
    return save_page(Path(output_dir) / "tokens.html", text)


def choose_answers(rows, pictures):
    """Up to 16 answers: those with a picture first, and an answer to every problem before any second one."""
    seen = Counter()
    ranks = []
    for row in rows:
        seen[row["id"]] += 1
        ranks.append((row["id"] not in pictures, seen[row["id"]]))
    order = sorted(range(len(rows)), key=ranks.__getitem__)
    return [rows[i] for i in order[:16]]


def highest(rows, key):
    """The highest value of a signal on the page, which gets the full shade; 1 if all values are 0."""
    top = max(value for row in rows for value in row[key])
    return 1 if top == 0 else top


def button(key):
    """The radio button that chooses a shade; the first shade is chosen at the start."""
    checked = " checked" if key == next(iter(SHADES)) else ""
    return f'<input type="radio" name="shade" id="{key}"{checked}>'


def scales(tops):
    """The names of the shades, and below them the scale of each. tops: {signal: its highest value on the page}."""
    labels = "".join(f'<label for="{key}">{shade.name}</label>' for key, shade in SHADES.items())
    bars = [f'<p class="quiet {key}">0 <i></i> {tops[key]:.3g}{shade.unit}: {shade.meaning}</p>'
            for key, shade in SHADES.items()]
    return labels + "".join(bars)


def answer_html(row, tops, pictures):
    """One answer as HTML: its picture, its problem and its tokens."""
    return ANSWER.format(
        picture=picture_tag(row["id"], pictures),
        id=html.escape(str(row["id"])),
        problem=html.escape(row["problem"]),
        tokens="".join(token_html(row, i, tops) for i in range(len(row["tokens"]))),
    )


def token_html(row, i, tops):
    """Token i of an answer as HTML, with its signals: as numbers, and as shares of `tops` for the shades."""
    token = row["tokens"][i]
    shades = ";".join(f"--{key}:{row[key][i] / tops[key]:.2f}" for key in SHADES)
    numbers = ", ".join(f"{shade.name} {row[key][i]:.4g}{shade.unit}" for key, shade in SHADES.items())
    kept = ' class="kept"' if row["kept"][i] else ""
    line_ends = "\n" * token.count("\n")  # so that a line that ends in the answer ends on the page too
    return f'<span{kept} style="{shades}" title="{numbers}">{html.escape(token_text(token))}</span>{line_ends}'


# --- the page of a run


def page(output_dir, pictures=None, more=""):
    """Writes output_dir/report.html and curves.png; returns the path of the page.

    pictures: {problem id: PIL image}, shown beside the samples. more: HTML that comes below the curves.
    """
    args = load_args(output_dir)
    rows = load_metrics(output_dir)
    cards = [card(sample, pictures or {}) for sample in load_samples(output_dir)]
    middle = len(cards) // 2
    text = PAGE.format(
        title=html.escape(headline_of(rows)),
        about=html.escape(about(args)),
        picture=data_uri(curves(output_dir).read_bytes()),
        more=more,
        numbers="".join(numbers_row(rows, key) for key in logged(rows)),
        early="".join(cards[:middle][:4]),
        late="".join(cards[middle:][-4:]) or "No samples were logged.",
        flags=html.escape(json.dumps(args, indent=2)),
    )
    return save_page(Path(output_dir) / "report.html", text)


def load_samples(output_dir):
    """The rows of samples.jsonl; none if there is no such file: a warm start on given traces samples nothing."""
    if not (Path(output_dir) / "samples.jsonl").exists():
        return []
    return load(output_dir, "samples.jsonl", SAMPLE)


def finish(output_dir, pictures=None):
    """Draws all that a run has to show, in output_dir; returns the path of report.html.

    pictures: {problem id: PIL image}, for the problems whose picture is shown beside their answers.
    """
    more = ""
    if has_rows(output_dir, "signals.jsonl"):
        link = f'<p><a href="{tokens(output_dir, pictures).name}">Answers token by token</a></p>'
        picture = data_uri(signals(output_dir).read_bytes())
        more += MORE.format(title="Which tokens look at the picture, and which hesitate", picture=picture, link=link)
    if has_rows(output_dir, "clusters.jsonl"):
        picture = data_uri(clusters(output_dir, pictures).read_bytes())
        more += MORE.format(title="Ways of reasoning, by cluster", picture=picture, link="")
    return page(output_dir, pictures, more)


def has_rows(output_dir, name):
    """Whether a run wrote this file, and something into it."""
    path = Path(output_dir) / name
    return path.is_file() and path.stat().st_size > 0


# --- the command line


def pictures_of(output_dir):
    """{problem id: picture} for the problems of the run's last step; none where the data set is no longer there."""
    dataset = load_args(output_dir).get("dataset", "none")
    rows = []
    for name in ("samples.jsonl", "signals.jsonl", "clusters.jsonl"):
        if (Path(output_dir) / name).is_file():
            rows += load(output_dir, name, ["step", "id"])
    end = max((row["step"] for row in rows), default=0)
    last = {row["id"] for row in rows if row["step"] == end}
    try:
        return {problem["id"]: problem["images"][0] for problem in load_problems(dataset) if problem["id"] in last}
    except UserError:
        return {}


def label_runs(output_dirs):
    """{label: folders}. A label is a script, and the flags that tell the run from the script's other runs.

    Runs that differ only in their seed share a label.
    """
    flags = {folder: load_args(folder) for folder in output_dirs}
    runs = {}
    for folder, own in flags.items():
        siblings = [other for other in flags.values() if other["script"] == own["script"]]
        words = [f"{key}={own[key]}" for key in own if tells_apart(key, own, siblings)]
        label = " ".join([own["script"], *words])
        runs.setdefault(label, []).append(folder)
    return runs


def tells_apart(key, own, siblings):
    """Whether a flag is worth showing: it shapes what is learned, and another run has another value."""
    if key in ("seed", "output_dir", "resume", "report_to", "save_steps", "sample_batch_size"):
        return False
    return any(other.get(key) != own[key] for other in siblings)


def main(argv=None):
    """The command line. A UserError is one line and exit status 2."""
    parser = Parser(description="One run: its pictures and report.html, in it. Several: overlay.png.")
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="the --output_dir of a run")
    parser.add_argument("--out", default="overlay.png", help="where the picture of several runs goes")
    args = parser.parse_args(argv)
    try:
        if len(args.runs) == 1:
            print(finish(args.runs[0], pictures_of(args.runs[0])))
        else:
            print(overlay(label_runs(args.runs), args.out))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()

"""One row of a data set as a problem: its question, options, gold answer, verifier and pictures.

A new data set whose columns have other names is a line in COLUMNS. One whose answers need translating is a few lines in
`read_row`. What would stop training or reward nothing later is a RowFault here.
"""

import io
import math
import re
from pathlib import Path

from harness.answers import VERIFIERS, read_box, read_integer, read_letter, unbox

from PIL import Image, ImageOps

# What the parts of a problem are called, the preferred name first: in geometry3k (images, problem, answer), MathVista
# (decoded_image, query, answer, pid), ViRL39K (image, question, answer, qid), MMK12 (image, question, answer, id),
# VLAA-Thinking (image, question, gt, verifier_type, ds_answer), MathVision and DynaMath (decoded_image, question,
# answer or ground_truth), We-Math (image_path), HallusionBench (gt_answer), MathVerse, LogicVista and MMStar (image,
# question, answer), imagefolder's metadata.jsonl (file_name), and in one's own data.
COLUMNS = {
    "images": (
        "images", "decoded_image", "image", "image_path", "images_file_names", "image_file_name", "file_name",
    ),
    "problem": ("problem", "query", "question"),
    "answer": ("answer", "ground_truth", "gt_answer", "solution", "gt"),
    "verifier": ("verifier", "verifier_type"),
    "trace": ("trace", "ds_answer"),
    "id": ("id", "pid", "qid"),
}
OPTIONAL = ("verifier", "trace", "id")
OPTIONS = ("choices", "options", "option")  # one column: a list, or a text such as "A. 5; B. 6"
OPTION_OF_ITS_OWN = re.compile(r"(?:(?:choice|option|opt|op)[ _]?)?([a-h])")  # a column for each option
UNREAD_OPTIONS = re.compile(
    r"(?:answer|mc|multiple)_?(?:choice|option)s?|choice|candidates?|distractors?|alternatives?|answer_list|"
    r"mc\d_targets|(?:choice|option)s?_(?:str|text|list|labels?)|(?:choice|option|opt)s?[ _]?\d+")


class RowFault(ValueError):
    """A row that cannot be used: its column, its value, and advice (what is wrong and what to do)."""

    def __init__(self, column: str, value: object, advice: str) -> None:
        super().__init__(f"column {column}, value '{shorten(value)}': {advice}")


# --- a row ------------------------------------------------------------------------------------------------------------


def read_row(row: dict, columns: dict[str, str]) -> dict:
    """A problem without its pictures: problem, answer, verifier, and id and trace where the row has them.

    Raises RowFault for options or places of pictures that would not reach the prompt as they should.
    """
    values = {part: row[column] for part, column in columns.items() if row[column] is not None}
    text = question_of(row, values, columns)
    if not text.strip():  # trap: broken problems
        raise RowFault(columns["problem"], text, "the problem is empty; write one, or leave the row out")
    answer = gold_text(row, values, columns)
    choices = options_of(row)
    verifier = named_verifier(values)
    if not verifier:
        verifier = "mcq" if choices else default_verifier(row, text, answer)
    if choices:
        answer = chosen_letter(answer, choices, columns["answer"])
        text = with_choices(text, choices)
    if row.keys() >= MATH_VISION and not isinstance(row[columns["images"]], list):
        text = with_names(text)
    problem = {
        "problem": with_places(text, columns["problem"]),
        "answer": answer,
        "verifier": verifier,
    }
    for part in ("id", "trace"):
        if part in values:
            problem[part] = text_of(values, part, columns)
    return problem


def check_row(row: dict, problem: dict, columns: dict[str, str], root: Path | None) -> None:
    """Raises RowFault for pictures or a gold answer that would stop training, or reward nothing, later."""
    pictures = check_pictures(row[columns["images"]], problem["problem"], columns, root)
    try:
        check_gold(problem["answer"], problem["verifier"])  # trap: unreadable gold (an error here, not a reward later)
    except ValueError as error:
        raise RowFault(columns["answer"], row[columns["answer"]], f"it cannot be graded: {error}; correct it, give "
                       "another verifier, or leave the row out") from error
    if problem["verifier"] == "mcq":
        check_letter(problem["answer"], problem["problem"], columns["answer"])
    if problem["verifier"] == "iou":
        check_box(problem["answer"], pictures[0].size, columns["answer"])


def check_letter(answer: str, text: str, column: str) -> None:
    """Raises RowFault for a gold letter that is none of the options that the question lists."""
    listed = has_option("A", text) and has_option("B", text)
    if listed and not re.search(rf"\b{read_letter(answer)}\b", text):  # "red A, blue B" is a list too
        raise RowFault(column, answer, "the question lists no option of this letter; correct one of them")


def check_box(answer: str, size: tuple[int, int], column: str) -> None:
    """Raises RowFault for a gold box in pixels that reaches beyond its picture: it would be in other units."""
    width, height = size
    box = read_box(answer)
    if max(box) > 1 and (min(box) < -1 or box[2] > width + 1 or box[3] > height + 1):
        raise RowFault(column, answer, f"the box reaches beyond its picture of {width} × {height} pixels; give pixels "
                       "of this picture or fractions of its sides, or name another verifier")


def gold_text(row: dict, values: dict, columns: dict[str, str]) -> str:
    r"""A gold answer (text, number or list) as text, without \boxed{}; "" for a dict, which means nothing here.

    A solution that ends in "†Answer: ..." (VLAA-Thinking) is that answer. HallusionBench's 1 and 0 are Yes and No.
    """
    gold = values.get("answer", "")
    is_hole = isinstance(gold, float) and math.isnan(gold)
    if isinstance(gold, dict) or is_hole:
        return ""
    if isinstance(gold, list) and len(gold) == 1:
        gold = gold[0]
    if isinstance(gold, list) and any(isinstance(entry, str) for entry in gold):
        raise RowFault(columns["answer"], gold, "it is a list of answers; give one")
    if isinstance(gold, float) and gold.is_integer():
        gold = int(gold)  # 3 beside 2.5, or beside a hole, is 3.0 in its column
    text = str(gold)
    if columns["answer"] == "gt_answer" and "gt_answer_details" in row:
        text = {"0": "No", "1": "Yes"}.get(text, text)
    return unbox(text.rpartition("†Answer:")[2]).strip()


def check_pictures(value: object, text: str, columns: dict[str, str], root: Path | None) -> list[Image.Image]:
    """A row's pictures. Raises RowFault where they cannot be opened, and for a text that names more or fewer."""
    pictures = open_pictures(value, columns["images"], root)
    if not pictures:  # trap: broken problems (text only)
        raise RowFault(columns["images"], value, "there is no picture; add one, or leave the row out")
    places = text.count("<image>")
    if places not in (0, len(pictures)):
        raise RowFault(columns["problem"], text, f"<image> appears {places} times for {len(pictures)} pictures; make "
                       "the numbers equal, or leave <image> out (the pictures then come first)")
    return pictures


# --- its question -----------------------------------------------------------------------------------------------------

PLACE = re.compile(r"<image[ _]?(\d+)>")
MATH_VISION = {"options", "level", "subject"}  # it has one picture for each question, in which <image2> is a label
# Whatever else would reach the model as a picture's place or as a mark of the chat: <img>, <Image>, <|image_pad|>.
STRAY_MARK = re.compile(
    r"</?(?:image|img|pic|figure|video|audio)[^<>]*>|\[image\]|\[img[ _]?\d*\]|"
    r"(?<!\w)\{(?:image|img)[ _]?\d*\}|<\|\w+\|>", re.IGNORECASE)


def question_of(row: dict, values: dict, columns: dict[str, str]) -> str:
    """The text of a question. That of MathVerse's "Vision Only" version stands in the picture alone."""
    if row.get("problem_version") == "Vision Only":
        return "Answer the question that the picture asks."
    return text_of(values, "problem", columns)


def text_of(values: dict, part: str, columns: dict[str, str]) -> str:
    """The text of a part of a problem, "" where it is missing. RowFault for a list or a dict, such as a whole chat."""
    value = values.get(part, "")
    if isinstance(value, list | dict):
        raise RowFault(columns[part], value, "it is no text; write it as one")
    return str(value)


def with_names(text: str) -> str:
    """A text whose <image1>, <image2> are parts of one picture, which shows their names: [image 1], [image 2].

    <image1> alone stays what it is, the picture's place.
    """
    if PLACE.findall(text) in ([], ["1"]):
        return text
    return PLACE.sub(r"[image \1]", text)


def with_places(text: str, column: str) -> str:
    """A text with `<image>` where its pictures belong. Raises RowFault for a place that would reach the prompt as text.

    <image1>, <image 2> are places too, where they count up from 1 and each stands once.
    """
    numbers = [int(number) for number in PLACE.findall(text)]
    if numbers != list(range(1, len(numbers) + 1)):
        raise RowFault(column, text, f"its pictures are numbered {numbers}, not 1, 2, ... in order, each once; write "
                       "<image> where a picture belongs, and put the pictures in that order")
    text = PLACE.sub("<image>", text)
    stray = STRAY_MARK.search(text.replace("<image>", ""))
    if stray is not None:
        raise RowFault(column, text, f"{stray.group()} would reach the model as text; write <image> where a picture "
                       "belongs, and nothing else of that kind")
    return text


# --- its options ------------------------------------------------------------------------------------------------------


def options_of(row: dict) -> list[str]:
    """The options that a row has in columns of their own; [] where it has none. RowFault where they cannot be read."""
    of_their_own = {}
    for name, value in row.items():
        if value is None or value == "" or value == []:
            continue
        if name.lower() in OPTIONS:
            return read_options(name, value)
        match = OPTION_OF_ITS_OWN.fullmatch(name.lower())
        if match is not None:
            of_their_own[match.group(1).upper()] = str(value)
        elif UNREAD_OPTIONS.fullmatch(name.lower()) or seem_options(name, value):
            raise RowFault(name, value, "these look like options, which the prompt would lack; call the column choices")
    if len(of_their_own) < 2:
        return []
    return in_order("A to H", of_their_own)


def seem_options(name: str, value: object) -> bool:
    """Whether a column of another name holds options, as in all_choices: ["red", "blue"]."""
    if re.search("choice|option", name.lower()) is None:
        return False
    return isinstance(value, list | dict) or len(split_options(str(value))) > 1


def read_options(column: str, value: object) -> list[str]:
    """The options in one column: a list, {letter: option}, or a text such as "A. 5; B. 6". RowFault if one is empty."""
    if isinstance(value, dict):
        return in_order(column, {name: str(option) for name, option in value.items() if option})
    if isinstance(value, list):
        if any(option is None or not str(option).strip() for option in value):
            raise RowFault(column, value, "one of its options is empty; write it, or leave the row out")
        return [str(option) for option in value]
    options = split_options(str(value))
    if len(options) < 2:
        raise RowFault(column, value, "its options cannot be told apart; write a list, or A. ...; B. ...")
    return options


def in_order(column: str, options: dict[str, str]) -> list[str]:
    """Options by their letters. RowFault unless they are A, B, ... without a gap."""
    letters = sorted(options)
    if letters != [letter(number) for number in range(len(letters))]:
        raise RowFault(column, options, f"its options are called {', '.join(letters)}; call them A, B, ... in order")
    return [options[name] for name in letters]


def split_options(text: str) -> list[str]:
    """The options of "A. 5; B. 6; C. none", each without its letter; [] unless it begins with A."""
    starts = []
    ends = [0]
    for mark in re.finditer(r"(?:^|[;,\s])\(?([A-Z])[.):：．、]", text):
        if mark.group(1) == letter(len(starts)):  # the letters come in order: a C inside option A opens nothing
            starts.append(mark.start())
            ends.append(mark.end())
    if not starts or text[:starts[0]].strip():
        return []
    stops = [*starts[1:], len(text)]
    return [text[start:stop].strip(" ;,\n") for start, stop in zip(ends[1:], stops, strict=True)]


def chosen_letter(answer: str, choices: list[str], column: str) -> str:
    """The letter of the gold answer to a question with choices. Raises RowFault when it is not one of them."""
    if answer in choices:  # MathVista answers with the text of the option
        return letter(choices.index(answer))
    chosen = read_letter(answer)
    if chosen is None or chosen not in [letter(number) for number in range(len(choices))]:
        raise RowFault(column, answer, f"it is none of the choices {shorten(choices)}; correct it")
    return chosen


def with_choices(text: str, choices: list[str]) -> str:
    """A question followed by its choices, (A), (B), ..., unless it names each of them already."""
    if all(names_option(text, number, choice) for number, choice in enumerate(choices)):
        return text
    letters = [letter(number) for number in range(len(choices))]
    if choices == letters:  # the options are in the picture
        return text + "\nChoices: " + ", ".join(f"({name})" for name in letters)
    text += "\nChoices:"
    for name, choice in zip(letters, choices, strict=True):
        text += f"\n({name}) {choice}"
    return text


def names_option(text: str, number: int, choice: str) -> bool:
    """Whether a question holds an option with its letter, as in "(B) red", "B. red" or "B: red"."""
    mark = rf"(?:^|[\s(]){letter(number)}[).:：．、]\s*"
    return re.search(mark + re.escape(choice.strip()), text) is not None


def letter(number: int) -> str:
    """The letter of an option: 0 is A."""
    return chr(ord("A") + number)


# --- its verifier -----------------------------------------------------------------------------------------------------


def named_verifier(values: dict) -> str:
    """The verifier that a row names, in the spelling of VERIFIERS ("Open-Ended" is open_ended); "" if it names none."""
    name = str(values.get("verifier", "")).strip().lower()
    return re.sub(r"[\s-]+", "_", name)


def default_verifier(row: dict, text: str, answer: str) -> str:
    """The verifier of a row that names none: by its columns where they say it, else by question and answer."""
    is_choice = row.get("question_type") in ("multi-choice", "multi_choice")  # MathVerse, MathVista
    asks_for_letters = "specific_capability" in row  # LogicVista: its options may stand in the picture alone
    if (is_choice or asks_for_letters) and read_letter(answer) is not None:
        return "mcq"
    if row.get("answer_type") == "list":
        return "math"  # four numbers are not always a box
    return infer_verifier(text, answer)


def infer_verifier(problem: str, answer: str) -> str:
    """A letter among options: mcq. An integer that counts something: digit. A box: iou. Anything else: math."""
    if read_letter(answer) is not None and lists_options(problem):
        return "mcq"
    # Not every integer is a count: where 54 is an angle or a length, 54.0 and "54 cm" are right too, and math knows it.
    if read_integer(answer) is not None and re.search(r"(?i)\b(how many|count|number of)\b", problem):
        return "digit"
    if read_box(answer) is not None:
        return "iou"
    return "math"


# "Select from A-E", "choose one of A, B, C and D" (LogicVista)
LETTERS_TO_CHOOSE = re.compile(
    r"(?i:select|choose|pick|option|answer)[^.?!]{0,40}\bA(?: ?(?:-|–|to|through) ?[B-I]|, ?B)\b")


def lists_options(problem: str) -> bool:
    """Whether a question lists options A and B, or names the letters to choose from."""
    if LETTERS_TO_CHOOSE.search(problem):
        return True
    return has_option("A", problem) and has_option("B", problem)


def has_option(option: str, problem: str) -> bool:
    """Whether a question lists an option of this letter, as in "(A) red", "A. red" or "A: red"."""
    return re.search(rf"(?:^|[\s(]){option}[).:,．：、）]", problem) is not None


def check_gold(answer: str, verifier: str) -> None:
    """Raises ValueError, saying why, when no answer could ever be compared with this gold answer."""
    if verifier not in VERIFIERS:
        raise ValueError(f"the verifier {verifier!r} is none of {', '.join(VERIFIERS)}")
    read, needs = VERIFIERS[verifier]
    if read(unbox(answer)) is None:  # trap: unreadable gold
        raise ValueError(f"the verifier {verifier} needs {needs}")


# --- its pictures -----------------------------------------------------------------------------------------------------


def open_pictures(value: object, column: str, root: Path | None) -> list[Image.Image]:
    """A list of PIL pictures in RGB, from what a data set holds: one or several of a path, or {bytes, path}.

    Paths start from root. Raises RowFault for a picture that cannot be opened or used.
    """
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    pictures = []
    for item in items:
        if isinstance(item, dict):
            data = item.get("bytes")
            path = item.get("path")
        else:
            data = None
            path = item
        pictures.append(open_picture(data, path, column, root))
    return pictures


def open_picture(data: bytes | None, path: str | None, column: str, root: Path | None) -> Image.Image:
    """One picture in RGB, from its bytes where they are given, otherwise from its path. Raises RowFault."""
    if data is None and root is None:
        raise RowFault(column, path, "the data set gives only this path, not the picture; download it with its "
                       "pictures, unpack them, and name the folder or file in place of the data set")
    try:
        source = locate(path, root) if data is None else io.BytesIO(data)
        with Image.open(source) as file:
            picture = on_white(file)
    except (OSError, SyntaxError, ValueError, TypeError, Image.DecompressionBombError) as error:
        place = f" under {root}" if root else ""
        raise RowFault(column, path, f"the picture cannot be opened ({shorten(error)}); restore it{place}, or leave "
                       "the row out") from error  # trap: broken problems (a corrupt or missing picture)
    width, height = picture.size
    if max(width, height) >= 200 * min(width, height):
        raise RowFault(column, path, f"the picture is {width} × {height}, the processor refuses sides of 200 : 1; "
                       "crop it, or leave the row out")
    return picture


def on_white(picture: Image.Image) -> Image.Image:
    """A picture in RGB, upright, on white paper. Raises ValueError for one of 16 bits, which would turn white or black.

    `convert` alone would show what lies below transparent pixels, often black. Cameras say how to turn a photograph.
    """
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits a colour (mode {picture.mode}); save it with 8")
    picture = ImageOps.exif_transpose(picture)
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    picture = picture.convert("RGBA")  # trap: transparent pictures
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture).convert("RGB")


def locate(path: str, root: Path) -> Path:
    """The file of a picture: as its path says; else under the root without leading slashes, or in images/ there."""
    inside = path.lstrip("/")  # VLAA-Thinking's paths may begin with a slash; its pictures lie in images/
    for place in (root / path, root / inside, root / "images" / inside):
        if place.is_file():
            return place
    return root / inside


def shorten(value: object, length: int = 80) -> str:
    """A value on one line, cut to a length in characters."""
    line = " ".join(str(value).split())
    if len(line) <= length:
        return line
    return line[:length - 1] + "…"

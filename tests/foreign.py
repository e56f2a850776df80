"""Small files of every data set that the recipes name: the columns, the file names and the oddities of the real one.

FILES = {name: a function that writes the files into a folder and returns what to give as --dataset}. Four rows each.
"""

import json

import datasets
from conftest import picture


def pictures(count=4):
    return [picture(56, 56 + 28 * (number % 2), number) for number in range(count)]


def write_parquet(path, columns, images):
    """A parquet file with its pictures inside; `images` is their column, a list of them where a row has a list."""
    data = datasets.Dataset.from_dict(columns)
    is_list = isinstance(columns[images][0], list)
    kind = datasets.List(datasets.Image()) if is_list else datasets.Image()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.cast_column(images, kind).to_parquet(path)
    return path


def save_pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(pictures()):
        image.save(folder / f"{number}.png")


def geometry3k(folder):
    path = write_parquet(folder / "data/train-00000-of-00001.parquet", {
        "images": [[image] for image in pictures()],
        "problem": ["<image>Find x.", "<image>\\triangle R S T \\cong \\triangle X Y Z. Find y.", "<image>Find x.",
                    "<image>Find m \\angle 2."],
        "answer": ["2 \\sqrt { 221 }", "15", "\\frac { 3 } { 7 }", "6.45"],
    }, "images")
    return f"{path}@train"


def mmk12(folder):
    write_parquet(folder / "data/train-00000-of-00003.parquet", {
        "id": ["abb5ab16", "ea991007", "1b879781", "0c3f"],
        "question": ["As shown in the figure, $$AB$$ is a diameter. Find the angle.", "The table below ...", "Area?",
                     "Which is right?\nA. $$1$$\nB.2.3.\nC. 3\nD. 4"],
        "answer": ["$$35^{\\circ}$$", "$$0.6$$", "3/4", "B"],
        "subject": ["math"] * 4,
        "image": [pictures()[0].convert("RGBA"), *pictures()[1:]],
    }, "image")
    return f"{folder}@train"


def virl39k(folder):
    """Paths into an archive that is unpacked beside the table; a row may have several pictures."""
    save_pictures(folder / "images")
    path = folder / "39Krelease.parquet"
    datasets.Dataset.from_dict({
        "question": ["<image>What is x?\nA. 1\nB. 2", "<image>What is y?", "Compare <image> and <image>.", "Why?"],
        "answer": ["\\boxed{B}", "\\boxed{\\frac{1}{2}}", "\\boxed{3}", "\\boxed{x=4}"],
        "PassRate_32BTrained": [0.5] * 4,
        "PassRate_7BBase": [0.1] * 4,
        "category": ["GradeSchool Geometric"] * 4,
        "source": ["MMR1"] * 4,
        "qid": [f"MMR1-{number}" for number in range(4)],
        "image": [["images/0.png"], ["images/1.png"], ["images/2.png", "images/3.png"], ["images/3.png"]],
    }).to_parquet(path)
    return str(path)


SOLUTION = "Step 1: Substitute.\nStep 2: So a = -5.\n\n†Answer: y = -5 * sin(-5 * x)."


def vlaa_thinking(folder):
    """A json beside images/: paths with and without a slash, counts as numbers, `meta` with keys of each source."""
    save_pictures(folder / "images/clevr_math")
    rows = [
        ("clevr_math-0.png", "/clevr_math/0.png", "Subtract all balls. How many objects are left?", 3, "digit",
         {"caption_model_id": "m", "rationale": "There are two."}),
        ("geoqa170k-1", "clevr_math/1.png", "What is tan?\nChoices:\nA: 1\nB: 2\nC: \\frac{√{3}}{3}", "C", "mcq",
         {"caption_model_id": "m", "rationale": ""}),
        ("synthesis-2", "clevr_math/2.png", "What is the function's equation?", SOLUTION, "math",
         {"text_question": "The function ..."}),
        ("vg-3", "/clevr_math/3.png", "Where is the red ball?", "[0.1, 0.2, 0.7, 0.5]", "iou", {}),
        ("allava-4", "/clevr_math/3.png", "What may the store mean to its area?", "It may be central.", "open_ended",
         {"caption_model_id": "m", "url": "https://u", "llava-v1.5-7b-ppl-caption": 13.631}),
    ]
    entries = []
    for id, image, question, gold, verifier, meta in rows:
        trace = f"<think>\nOkay, let's see.\n</think>\n\n<answer>{str(gold).rpartition('†Answer:')[2].strip()}</answer>"
        entries.append(dict(id=id, image=image, question=question, gt=gold, ds_answer=trace, caption="A picture.",
                            verifier_type=verifier, meta=meta))
    (folder / "VLAA-Thinking-GRPO-25K.json").write_text(json.dumps(entries))
    return str(folder / "VLAA-Thinking-GRPO-25K.json")


def mathvista(folder):
    write_parquet(folder / "data/testmini-00000-of-00001-725687bf7a18d64b.parquet", {
        "pid": ["1", "2", "3", "4"],
        "question": ["Which?", "Count.", "How long?", "List."],
        "image": [f"images/{number}.jpg" for number in range(4)],
        "decoded_image": pictures(),
        "choices": [["left", "right"], None, None, None],
        "unit": [None, None, "cm", None],
        "precision": [None, 1.0, 1.0, None],
        "answer": ["right", "7", "1.2", "[0, 2, 5, 7]"],
        "question_type": ["multi_choice", "free_form", "free_form", "free_form"],
        "answer_type": ["text", "integer", "float", "list"],
        "metadata": [{"category": "math-targeted-vqa", "skills": ["geometry reasoning"]}] * 4,
        "query": ["Hint: Choose.\nQuestion: Which?\nChoices:\n(A) left\n(B) right", "Count.", "How long?", "List."],
    }, "decoded_image")
    return f"{folder}@testmini"


def mathverse(folder):
    path = write_parquet(folder / "testmini.parquet", {
        "sample_index": ["1", "2", "3", "4"],
        "problem_index": ["1", "1", "2", "2"],
        "problem_version": ["Text Dominant", "Vision Only", "Vision Intensive", "Vision Only"],
        "question": ["Find angle A.\nChoices:\nA:36°\nB:54°", "", "How long is BC?", ""],
        "image": pictures(),
        "answer": ["B", "B", "5.4cm", "5.4cm"],
        "question_type": ["multi-choice", "multi-choice", "free-form", "free-form"],
        "metadata": [{"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"}] * 4,
        "query_wo": ["Please directly answer."] * 4,
        "query_cot": ["Please first reason."] * 4,
        "question_for_eval": ["Find angle A.\nChoices:\nA:36°\nB:54°"] * 2 + ["How long is BC?"] * 2,
    }, "image")
    return f"{path}@testmini"


def mathvision(folder):
    write_parquet(folder / "data/test-00000-of-00001-3532b8d3f1b4047a.parquet", {
        "id": ["1", "4", "31", "2673"],
        "question": ["Which bike is it?\n<image1>", "How many digits are there?\n<image1>",
                     "How many ducks weigh the same as a crocodile?\n<image1>\n<image2>", "Which net is a cube?"],
        "options": [["A", "B", "C", "D", "E"], [], ["3", "\\sqrt{2}"], ["<image1>", "<image2>"]],
        "image": ["images/1.jpg", "images/4.jpg", "images/31.jpg", "images/2673.jpg"],
        "decoded_image": pictures(),
        "answer": ["A", "6", "B", "A"],
        "solution": [None, None, None, "We fold."],
        "level": [2, 1, 1, 5],
        "subject": ["arithmetic", "counting", "arithmetic", "solid geometry"],
    }, "decoded_image")
    return f"{folder}@test"


def wemath(folder):
    """One ID stands in several rows."""
    write_parquet(folder / "data/testmini-00000-of-00001.parquet", {
        "ID": ["3steps_165"] * 4,
        "split": ["testmini"] * 4,
        "knowledge concept": ["Area of Circles"] * 4,
        "question": ["What is the area (  ) m²?", "What is the radius?", "OA = ( ) m, AB = ( ) m", "How many?"],
        "option": ["A. 200.96;B. 3215.36;C. 6280;D. 32; E. No correct answer", "A. 1 cm; B. 2 cm",
                   "A. 300, 400;B. 400, 300; C. No correct answer", "A. 1;B. 2;C. 3;D. 4"],
        "answer": ["B", "A", "C", "D"],
        "image_path": pictures(),
        "key": ["3steps_3", "3steps_1", "3steps_2", "3steps_multi"],
        "question number": [1575, 1573, 1574, 1576],
        "knowledge concept description": ["Area of ..."] * 4,
    }, "image_path")
    return f"{folder}@testmini"


def logicvista(folder):
    write_parquet(folder / "data/test-00000-of-00001.parquet", {
        "question": ["Which box comes next? Select from A-E.", "Which fit? Select from A, B, C and D.",
                     "Which figure is a rotation of the object?", "Which set? (A) Set A (B) Set B (C) Neither"],
        "answer": ["C", "A, C", "B", "A"],
        "reasoning": ["It rotates."] * 4,
        "skill": [["inductive"]] * 4,
        "broad_capability": [["diagram"]] * 4,
        "specific_capability": [["sequence pattern"]] * 4,
        "imagesource": ["s"] * 4,
        "sourcelink": ["https://s"] * 4,
        "liscenced": ["false"] * 4,
        "id": ["v1_0", "v1_1", "v1_381", "v1_100"],
        "image": pictures(),
    }, "image")
    return f"{folder}@test"


def dynamath(folder):
    """On the hub, data/sample1-* is split sample_variant1."""
    write_parquet(folder / "data/sample1-00000-of-00001.parquet", {
        "id": ["1", "2", "3", "4"],
        "question": ["What is the period of this function?", "Which month is the hottest?",
                     "Is it even? Choices: (A) Yes (B) No", "Which node is visited first?"],
        "image": [f"images/{number}.png" for number in range(4)],
        "decoded_image": pictures(),
        "ground_truth": ["2.0944", "Sep", "B", "D"],
        "answer_type": ["float", "text", "multiple choice", "text"],
        "subject": ["analytic geometry"] * 4,
        "knowledge_level": ["high school"] * 4,
    }, "decoded_image")
    return f"{folder}@sample1"


def hallusionbench(folder):
    write_parquet(folder / "data/image-00000-of-00001.parquet", {
        "category": ["VD"] * 4,
        "subcategory": ["illusion"] * 4,
        "visual_input": ["1"] * 4,
        "set_id": ["0"] * 4,
        "figure_id": ["1"] * 4,
        "sample_note": ["circle"] * 4,
        "question_id": ["0", "1", "2", "3"],
        "question": ["Are the circles of the same size?", "Is the left one larger?", "Are they red?", "Is it round?"],
        "gt_answer_details": ["They are.", "It is not.", "They are.", "It is not."],
        "gt_answer": ["1", "0", "1", "0"],
        "filename": ["./hallusion_bench/VD/illusion/0_1.png"] * 4,
        "image": pictures(),
    }, "image")
    return f"{folder}@image"


def mmstar(folder):
    path = write_parquet(folder / "mmstar.parquet", {
        "index": [0, 1, 2, 3],
        "question": ["Which option fits?\nOptions: A: A toy train, B: A boat, C: A car, D: A plane"] * 4,
        "image": pictures(),
        "answer": ["A", "B", "C", "D"],
        "category": ["coarse perception"] * 4,
        "l2_category": ["image scene and topic"] * 4,
        "meta_info": [{"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}] * 4,
    }, "image")
    return str(path)


FILES = {
    "geometry3k": geometry3k, "MMK12": mmk12, "ViRL39K": virl39k, "VLAA-Thinking": vlaa_thinking,
    "MathVista": mathvista, "MathVerse": mathverse, "MathVision": mathvision, "We-Math": wemath,
    "LogicVista": logicvista, "DynaMath": dynamath, "HallusionBench": hallusionbench, "MMStar": mmstar,
}

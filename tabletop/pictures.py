"""How a grid is drawn: one cell of 28x28 pixels to a visual token, smooth shapes of three sizes, thin lines."""

import math
import random
from functools import cache

from tabletop.grids import CELL, COLOURS, LINE, PAPER, Cell, Spec

from PIL import Image, ImageDraw

SHAPE_SIZES = (17, 19, 21)  # pixels across a circle; the other shapes are about as large
FINER = 4  # a shape is drawn this many times too large, then shrunk, so that its edges are smooth


def draw(spec: Spec, fade: float = 0.0) -> Image.Image:
    """The picture of a problem, in RGB. Every shape has one of three sizes and is at most a pixel off its place.

    `fade` mixes the whole picture with the colour of the paper: at 0 it is clear, at 1 nothing is left.
    """
    rng = random.Random(spec.drawing)
    image = Image.new("RGB", (CELL * len(spec.grid[0]), CELL * len(spec.grid)), PAPER)
    for y, row in enumerate(spec.grid):
        for x, cell in enumerate(row):
            if cell is not None:
                left = CELL * x + rng.randint(-1, 1)
                top = CELL * y + rng.randint(-1, 1)
                image.paste(_tile(cell, rng.choice(SHAPE_SIZES)), (left, top))
    _draw_lines(image)
    if fade == 0:
        return image
    return Image.blend(image, Image.new("RGB", image.size, PAPER), fade)


def _draw_lines(image):
    """The lines between the cells, and a frame around them all."""
    pen = ImageDraw.Draw(image)
    for edge in range(0, max(image.size), CELL):
        pen.line((edge, 0, edge, image.height), LINE)
        pen.line((0, edge, image.width, edge), LINE)
    pen.rectangle((0, 0, image.width - 1, image.height - 1), outline=LINE)


@cache
def _tile(cell: Cell, size: int) -> Image.Image:
    """One shape in its cell."""
    colour, shape = cell
    image = Image.new("RGB", (FINER * CELL, FINER * CELL), PAPER)
    pen = ImageDraw.Draw(image)
    fill = COLOURS[colour]
    middle = FINER * CELL // 2
    radius = FINER * size // 2
    if shape == "circle":
        pen.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill)
    elif shape == "square":
        half = 0.85 * radius
        pen.rectangle((middle - half, middle - half, middle + half, middle + half), fill)
    elif shape == "triangle":
        pen.regular_polygon((middle, middle + radius / 5, 1.15 * radius), 3, fill=fill)
    else:
        pen.polygon(_star(middle, radius), fill)
    return image.resize((CELL, CELL), Image.Resampling.LANCZOS)


def _star(middle, radius):
    """The ten corners of a star, tips and notches in turn; the first tip points up."""
    corners = []
    for k in range(10):
        reach = 1 if k % 2 == 0 else 0.45
        distance = radius * 1.15 * reach
        angle = math.pi * (k / 5 - 0.5)
        x = middle + distance * math.cos(angle)
        y = middle + radius / 10 + distance * math.sin(angle)
        corners.append((x, y))
    return corners

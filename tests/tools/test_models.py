"""The tabletop's models: real checkpoints, made the same every time, kept in the user's cache."""

import json

import common
from tabletop import models
from tabletop.grids import COLOURS, SHAPES, Spec
from tabletop.pictures import draw
from tabletop.problems import problem_of, spec_of
from tabletop.traces import traces

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

# --- tokenizer and prompt ---------------------------------------------------------------------------------------------


XXX

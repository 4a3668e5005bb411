"""Imports that a run makes, for the server of forked.py."""

import torch

from library.imports import import_diffusers, import_transformers

torch.set_num_threads(1)
import_transformers()
import_diffusers()
from diffusers import AutoencoderKL  # noqa: E402, F401
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: E402, F401

import library.training.tasks.network  # noqa: E402, F401

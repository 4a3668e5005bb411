"""Helpers of tests that run sdxl_gen_img.py."""

import numpy as np
from PIL import Image

SMALL = ["--W", "64", "--H", "64", "--steps", "2", "--sampler", "euler_a"]

# A value of each option within a prompt.
EVERY_OPTION = {
    "n": "dark, blurry", "c": "a drawing", "p2": "oil on canvas", "n2": "photo", "w": "96", "h": "64", "ow": "512", "oh": "768",
    "nw": "64", "nh": "32", "ct": "8", "cl": "16", "s": "3", "d": "7", "l": "4.5", "nl": "2", "t": "0.5", "am": "0.5",
    "dsd1": "2", "dst1": "700", "dsd2": "4", "dst2": "300", "dsr": "0.5", "glt": "800", "glr": "0.5", "gle": "1", "gls": "0.5",
    "glsn": "0.9", "glus": "3,0.5,0.5,0",
}  # fmt: skip


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def assert_same(one, two, most=0):
    assert np.abs(pixels(one) - pixels(two)).max() <= most

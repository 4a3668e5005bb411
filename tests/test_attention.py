"""The choice of the attention backend."""

import logging

from messages import mentions

from library.models.attention import choose_attention, chunked, sdpa


def test_xformers_that_isnt_installed_means_sdpa_and_one_line(caplog, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    logging.getLogger("library").propagate = True
    assert choose_attention(mem_eff_attn=False, use_xformers=True) is sdpa
    assert len(caplog.records) == 1 and mentions(caplog.text, "--xformers", "install", "--sdpa")


def test_precedence_is_mem_eff_then_xformers_then_sdpa():
    assert choose_attention(mem_eff_attn=True, use_xformers=True) is chunked
    assert choose_attention(mem_eff_attn=False, use_xformers=False) is sdpa

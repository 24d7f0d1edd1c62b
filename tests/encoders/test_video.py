"""Clips as input: tubes, their order, and their fixed positions."""

from __future__ import annotations

import math

import torch

from patchloom.encoders.video import TubeletEmbed, sine_cosine_table


def test_tubes_come_frame_by_frame_then_row_by_row():
    embed = TubeletEmbed(8, 4, 3, 16)
    with torch.no_grad():
        embed.proj.weight.zero_()
        embed.proj.weight[0] = 1 / (3 * 2 * 16)  # the mean of a tube
        embed.proj.bias.zero_()
    clip = torch.arange(12.0).view(3, 2, 2)  # one value for each tube: time, row, column
    clip = clip.repeat_interleave(2, 0).repeat_interleave(4, 1).repeat_interleave(4, 2)
    tokens = embed(clip.expand(1, 3, -1, -1, -1)) - sine_cosine_table(12, 16)
    torch.testing.assert_close(tokens[0, :, 0], torch.arange(12.0))


def test_positions_are_the_formula():
    table = sine_cosine_table(50, 12)
    for position in (0, 7, 49):
        for column in range(12):
            angle = position / 10000 ** (2 * (column // 2) / 12)
            wanted = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert math.isclose(float(table[position, column]), wanted, abs_tol=1e-7)

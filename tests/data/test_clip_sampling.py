"""Frames of clips: the published numbers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchloom.data.clip_sampling import dense_views, middle_segments, middle_window, sparse_views


@pytest.mark.parametrize(
    ("length", "starts"), [(300, [0, 14, 29, 44, 59]), (70, [0, 0, 1, 1, 2]), (60, [0] * 5), (5, [0] * 5)]
)
def test_dense_tests_begin_where_the_published_ones_do(length, starts):
    sampled = list(range(0, length, 4))
    sampled += [sampled[-1]] * (16 - len(sampled))
    assert dense_views(length, 16, 4, 5) == [sampled[start : start + 16] for start in starts]


def test_one_view_alone_is_in_the_middle():
    assert dense_views(300, 16, 4, 1) == [[4 * n for n in range(29, 45)]]
    assert sparse_views(100, 4, 1) == [middle_segments(100, 4)]


def test_sparse_tests_interleave_their_clips():
    clips = sparse_views(320, 16, 2)
    assert sorted(clips[0] + clips[1]) == middle_segments(320, 32)
    assert clips[0] == middle_segments(320, 32)[::2]


@settings(max_examples=50, deadline=None)
@given(length=st.integers(1, 400), frames=st.integers(1, 20), stride=st.integers(1, 6), count=st.integers(1, 6))
def test_every_frame_is_one_of_the_video(length, frames, stride, count):
    views = [*dense_views(length, frames, stride, count), *sparse_views(length, frames, count)]
    for places in [*views, middle_window(length, frames, stride), middle_segments(length, frames)]:
        assert len(places) == frames
        assert all(0 <= place < length for place in places)
        assert places == sorted(places)

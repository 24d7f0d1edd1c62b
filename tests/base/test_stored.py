"""Tensors on disk: damaged files and pickles of objects are refused in our words."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch

from patchloom.base.stored import DamagedFileError, damage, read_pickle, read_tensors
from patchloom.errors import UsageError


class NotPlain:
    """What a file must not hold."""


def test_objects_are_refused_without_advice_to_read_them_all_the_same(tmp_path):
    torch.save({"config": NotPlain()}, tmp_path / "model.pth")
    with pytest.raises(UsageError, match=r"it holds the object .*NotPlain, and objects could run code") as refused:
        read_pickle(tmp_path / "model.pth")
    assert "weights_only" not in str(refused.value)
    torch.save({"args": argparse.Namespace(lr=1)}, tmp_path / "plain.pth")
    assert read_pickle(tmp_path / "plain.pth", plain=[argparse.Namespace])["args"].lr == 1


def test_a_plain_pickle_is_refused_without_advice_of_torch(tmp_path, recwarn):
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"config": NotPlain()}, protocol=4))
    with pytest.raises(UsageError, match="cannot be read as plain tensors"):
        read_pickle(tmp_path / "model.pkl")
    assert not list(recwarn)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"plain text", b"\x80\x02."])
def test_what_is_no_such_file_is_called_damaged(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"file .*damaged"):
        read_pickle(path)
    with pytest.raises(DamagedFileError, match=r"is damaged \(.*\); delete it"):
        read_tensors(path, "delete it")
    assert damage(path)

"""The picture of block masks: its dots are the tiles that a kernel reads and multiplies."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bench.counted import block_tiles
from bench.patterns import TILE

LENGTH = 460  # the last tile is not whole


@pytest.fixture(scope="module")
def shown():
    return block_tiles.examples(LENGTH)


def test_kinds_of_tiles(shown):
    """By the mask itself."""
    for one in shown:
        for (row, column), kind in np.ndenumerate(one.kinds):
            part = one.mask[row * TILE :, column * TILE :][:TILE, :TILE]
            assert kind == (2 if part.all() else int(part.any())), one.title
    assert {kind for one in shown for kind in one.kinds.flat} == {0, 1, 2}
    documents = shown[0]
    assert (documents.run < (documents.kinds > 0)).any()  # what a causal mask leaves out


@pytest.mark.parametrize("number", range(3))
def test_tiles_that_run(shown, number, rng):
    """No other tile is read, and all of them are multiplied; one more or less is seen."""
    one = shown[number]
    assert block_tiles.difference(one) == ""
    for ran, words in ((True, "another tile is read: .*never written"), (False, "tiles run, not")):
        changed = one.run.copy()
        places = np.argwhere(changed == ran)
        row, column = places[rng.integers(len(places))]
        changed[row, column] = not ran
        found = block_tiles.difference(one._replace(run=changed))
        assert re.search(words, found), found


def test_dots_are_the_tiles_that_run(shown):
    pytest.importorskip("matplotlib")
    axes = block_tiles.figure(shown).axes
    assert [one.get_title() for one in axes] == [one.title for one in shown]
    for drawn, one in zip(axes, shown, strict=True):
        kinds, mask = (image.get_array() for image in drawn.images)
        np.testing.assert_array_equal(kinds, one.kinds)
        assert mask.sum() == one.mask.sum() and mask.shape[0] == TILE * len(kinds)
        np.testing.assert_array_equal(drawn.lines[0].get_xydata(), np.argwhere(one.run)[:, ::-1])


def test_the_command(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    files = [tmp_path / name for name in ("a.svg", "b.svg", "c.png")]
    monkeypatch.setattr(block_tiles, "difference", lambda one: "")
    for file in files:
        assert block_tiles.main(["--out", str(file), "--length", "300"]) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[2].read_bytes()[:4] == b"\x89PNG"
    assert "of 9 tiles run" in capsys.readouterr().out
    monkeypatch.setattr(block_tiles, "difference", lambda one: "3 tiles run, not 4")
    assert block_tiles.main(["--out", str(files[0]), "--length", "300"]) == 1
    with pytest.raises(SystemExit):
        block_tiles.main(["--out", str(files[0]), "--length", "2"])

"""The tracks that are kept beside a packed data set."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from favchat_jax.data import kept_tracks
from favchat_jax.data.faces.looking import FaceCrop
from favchat_jax.data.sources import open_dataset, prepare
from favchat_jax.data.video import decode
from favchat_jax.errors import UserError


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    prepare("rendered_faces/smoke", None, folder)
    return folder


def find_all(source, processes=0, crop=None):
    kept_tracks.find_all(source, crop or FaceCrop(), frames=4, size=32, processes=processes)
    return kept_tracks.file_of(source, crop or FaceCrop(), 4)


def test_kept_tracks_are_those_of_decoding(smoke):
    source = open_dataset("rendered_faces/smoke", smoke, "heldout")
    kept = kept_tracks.KeptTracks(find_all(source))
    for index in range(len(source)):
        record = source[index]
        clip = decode(record.clip, frames=4, size=32, face_crop=FaceCrop())
        again = decode(record.clip, frames=4, size=32, face_crop=FaceCrop(), tracks=kept.of(record.id))
        assert (clip.frames == again.frames).all() and again.tracks is not clip.tracks
    assert kept.of("another clip") is None


def test_a_stopped_search_goes_on_and_several_processes_write_the_same(smoke, monkeypatch):
    source = open_dataset("rendered_faces/smoke", smoke, "train")
    file = find_all(source)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert [json.loads(line)["id"] for line in lines] == [source[i].id for i in range(len(source))]
    file.write_bytes(b"".join(lines[:20]) + lines[20][:30])
    searched = []
    monkeypatch.setattr(kept_tracks, "decode", lambda *a, **k: searched.append(1) or decode(*a, **k))
    find_all(source)
    assert file.read_bytes() == whole and len(searched) == len(source) - 20
    find_all(source)
    assert len(searched) == len(source) - 20
    file.unlink()
    find_all(source, processes=2)
    assert file.read_bytes() == whole


def test_two_searches_at_once_find_each_face_once(smoke):
    source = open_dataset("rendered_faces/smoke", smoke, "heldout")
    find_all(source).unlink()
    with ThreadPoolExecutor(2) as pool:
        file, _ = pool.map(find_all, [source, source])
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == [
        r.id for r in map(source.__getitem__, range(len(source)))
    ]


def test_a_damaged_file_of_tracks_is_named(smoke):
    source = open_dataset("rendered_faces/smoke", smoke, "heldout")
    file = find_all(source)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:3], b"{damaged\n", *lines[4:]]))
    with pytest.raises(UserError, match=f"{file} is damaged: delete it"):
        kept_tracks.KeptTracks(file).of(source[0].id)
    file.unlink()


def test_how_many_clips_show_no_face_is_said(smoke, caplog):
    source = open_dataset("rendered_faces/smoke", smoke, "heldout")
    with caplog.at_level("INFO"):
        file = find_all(source, crop=FaceCrop(smallest=1.0))
    assert f"{len(source)} of {len(source)} clips show no face" in caplog.text
    file.unlink()


def test_other_settings_of_the_search_have_their_own_file(smoke):
    source = open_dataset("rendered_faces/smoke", smoke, "heldout")
    files = {
        kept_tracks.file_of(source, crop, frames) for crop in (FaceCrop(), FaceCrop(smallest=0.3)) for frames in (4, 8)
    }
    assert len(files) == 4
    # What is cut from a track does not change the search, nor do frames beyond the most that are searched.
    assert kept_tracks.file_of(source, FaceCrop(align=True), 64) == kept_tracks.file_of(source, FaceCrop(), 16)

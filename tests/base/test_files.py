import hashlib
import os

import pytest

from megatron_bliss.base.files import atomic_file, read_json, sha256_file, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), atomic_file(path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert read_json(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["value.json"]


def test_no_reader_sees_the_final_name_before_the_end(tmp_path):
    path = tmp_path / "value.bin"
    with atomic_file(path) as stream:
        stream.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert sha256_file(path) == hashlib.sha256(b"whole").hexdigest()


@pytest.mark.parametrize("content", [b"{", b"[1, 2]", b"\xff\xfe"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.json"):
        read_json(path)


def test_numbers_that_json_does_not_have_are_refused(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "nan.json", {"loss": float("nan")})
    assert not os.listdir(tmp_path)

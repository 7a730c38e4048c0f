"""Manifests and run files of any content: a SpikelmError, or a stage that is whole."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spikelm.errors import SpikelmError
from spikelm.run import RunDirectory, stage_manifest
from tests.robustness.profiles import examples
from tests.robustness.test_fuzz_recipes import VALUES, mostly

NAMES = st.one_of(
    st.sampled_from(["a", "b/c", "../secret", "/etc/passwd", "a" * 5000, "\\ud800", "", "b/../a"]), st.text()
)
DIGEST = hashlib.sha256(b"1").hexdigest()
FILES = st.fixed_dictionaries({"bytes": mostly(st.just(1)), "sha256": mostly(st.just(DIGEST))})
MANIFESTS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {
            "files": mostly(st.dictionaries(NAMES, mostly(FILES), max_size=3)),
            "record": mostly(st.just({})),
        }
    ),
)
DEEP = "[" * 100_000


@examples(60, 10_000)
@given(manifest=MANIFESTS)
def test_any_manifest(tmp_path_factory: pytest.TempPathFactory, manifest: Any) -> None:
    stage = tmp_path_factory.getbasetemp() / "manifests" / "stage"
    (stage / "b").mkdir(parents=True, exist_ok=True)
    for name in ("a", "b/c", "../secret"):
        (stage / name).write_text("1")
    if isinstance(manifest, dict):
        manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (stage / "manifest.json").write_text(json.dumps(manifest))
    try:
        found = stage_manifest(stage)
    except SpikelmError as error:
        assert "stage 'stage' is damaged" in str(error)
    else:
        assert set(found["files"]) <= {"a", "b/c"}


@pytest.mark.parametrize("text", [DEEP, "", "3", '{"files": [[5, 3]], "record": {}}', "1" + "0" * 5000])
def test_odd_files(text: str, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "manifest.json").write_text(text)
    with pytest.raises(SpikelmError, match="manifest.json is not readable"):
        stage_manifest(stage)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(SpikelmError, match="run.json is damaged|another run"):
        RunDirectory(tmp_path, {"a": 1})

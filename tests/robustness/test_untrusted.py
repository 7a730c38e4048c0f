"""Model directories of unknown origin: nothing of theirs is run, and nothing absurd is built."""

import json
import pickle
import shutil
import struct
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from spikelm import Recipe, spikify
from spikelm.compare import check_model
from spikelm.data.teacher import load_teacher, load_whole
from spikelm.errors import SpikelmError
from spikelm.limits import check_directory, check_weight_files, read_json
from spikelm.models.bispikclm import BiSpikCLMConfig
from spikelm.models.llamba import LlambaConfig
from spikelm.models.spikingbert import SpikingBertConfig
from tests.small_models import llamba


class Bomb:
    """Unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small spiking Llamba."""
    directory = tmp_path_factory.mktemp("student")
    model: Any = spikify(llamba(), Recipe.preset("mar"))
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def directory(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "student"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_recipe(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["recipe"] |= fields
    path.write_text(json.dumps(config))


def test_a_whole_directory_is_accepted(directory: Path) -> None:
    check_directory(directory)
    check_directory(directory / "absent")  # a name of the Hub, for all that is known
    assert AutoModelForCausalLM.from_pretrained(directory).num_parameters() > 0


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pkl"])
def test_a_pickle_is_not_read(name: str, directory: Path, tmp_path: Path) -> None:
    (directory / "model.safetensors").unlink()
    owned = tmp_path / "owned"
    (directory / name).write_bytes(pickle.dumps(Bomb(owned)))
    with pytest.raises(SpikelmError, match=f"model .* has its weights in {name}.*safetensors files are accepted"):
        check_directory(directory)
    with pytest.raises(Exception, match=r"(?i)weights only|safetensors|no file named"):
        AutoModelForCausalLM.from_pretrained(directory)
    assert not owned.exists()


def test_a_spiking_checkpoint_in_a_pickle_is_refused(directory: Path) -> None:
    """Even of tensors alone, which torch.load reads without running anything."""
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(SpikelmError, match=r"weights are in pytorch_model.bin; .safetensors files alone are accepted"):
        AutoModelForCausalLM.from_pretrained(directory)


def test_a_pickle_beside_the_weights_is_left_alone(directory: Path, tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    for name in ("pytorch_model.bin", "training_args.bin"):
        (directory / name).write_bytes(pickle.dumps(Bomb(owned)))
    check_directory(directory)
    AutoModelForCausalLM.from_pretrained(directory)
    assert not owned.exists()


def test_code_that_a_directory_brings_is_not_run(directory: Path, tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    (directory / "evil.py").write_text(f"open({str(owned)!r}, 'w')\n")
    change(directory / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False)
    change_recipe(directory, neuron_arguments={"surrogate_function": "__import__('os').system('true')"})
    with pytest.raises(SpikelmError, match="must name a class of spikingjelly's surrogate module"):
        AutoModelForCausalLM.from_pretrained(directory)
    assert not owned.exists()


@pytest.mark.parametrize("file", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, None])
def test_an_index_that_leaves_the_directory_is_refused(file: Any, directory: Path) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"lm_head.weight": file}}))
    with pytest.raises(SpikelmError, match="model.safetensors.index.json: a file of the same directory must be named"):
        check_directory(directory)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_layer": 10**9}, "n_layer must be at most 4096; got 1000000000"),
        ({"d_model": 2**62}, "d_model must be at most 2147483647"),
        ({"vocab_size": 10**400}, "vocab_size must be at most 2147483647; got an integer of 1329 bits"),
        ({"ssm_cfg": {"d_state": 10**12}}, "d_state must be at most"),
        ({"d_model": 10**6, "n_layer": 8}, r"asks for 8,000,064,000,000 parameters or more.* hold [\d,]+ bits"),
        ({"vocab_size": 2**31 - 1}, "asks for .* parameters or more"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(
    fields: dict[str, Any], message: str, directory: Path
) -> None:
    change(directory / "config.json", **fields)
    start = time.perf_counter()
    with pytest.raises(SpikelmError, match=message):
        check_directory(directory)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"T": 10**9}, "T must be at most 4096; got 1000000000"),
        ({"D": 2**62}, "D must be at most 4096"),
        ({"tau": 10**400}, "tau must be within"),
        ({"surrogate_function": {"name": "SquarewaveFourierSeries", "n": 10**9}}, "must be numbers within"),
    ],
)
def test_absurd_neurons_of_a_checkpoint_are_refused(arguments: dict[str, Any], message: str, directory: Path) -> None:
    change_recipe(directory, neuron_arguments=arguments)
    with pytest.raises(SpikelmError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


def test_more_parameters_than_the_files_hold_are_refused(directory: Path) -> None:
    """They would be made up: 38 layers beside the two that the file has."""
    change(directory / "config.json", n_layer=40)
    with pytest.raises(SpikelmError, match=r"the configuration asks for [\d,]+ parameters; the files hold [\d,]+"):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize("content", ["", "[", "[]", "3", "null", "[" * 100_000, "\xff"])
def test_a_configuration_that_is_none(content: str, directory: Path) -> None:
    (directory / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(SpikelmError, match=r"config\.json"):
        check_directory(directory)


@pytest.mark.parametrize("architectures", [True, [None], "LlamaForCausalLM", [["x"]], {"a": 1}])
def test_architectures_that_are_no_names(architectures: Any, directory: Path) -> None:
    change(directory / "config.json", architectures=architectures)
    with pytest.raises(SpikelmError, match="architectures must be a list of names"):
        check_directory(directory)


def test_a_name_that_no_directory_can_have() -> None:
    with pytest.raises(SpikelmError, match="model 'x+[.]+ cannot be read: File name too long"):
        check_directory("x" * 5000)


def test_a_huge_configuration_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(SpikelmError, match="has 1099511627776 bytes; at most 16777216 are accepted"):
        read_json(path)


@pytest.mark.parametrize("header", [b"", b"\xff" * 8, struct.pack("<Q", 10**12) + b"{}", struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_header_is_named(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(header)
    with pytest.raises(SpikelmError, match=r"model\.safetensors is damaged"):
        check_weight_files([path], 10)


def test_tied_weights_count_once(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000, 10)}, tmp_path / "model.safetensors")
    check_weight_files([tmp_path / "model.safetensors"], 20_000)
    with pytest.raises(SpikelmError, match="asks for 22,000 parameters; the files hold 10,000"):
        check_weight_files([tmp_path / "model.safetensors"], 22_000)


# ---- through the loaders and the configurations themselves


def test_the_loaders_ask_first(directory: Path) -> None:
    change(directory / "config.json", n_layer=10**9)
    for load in (load_teacher, check_model):
        with pytest.raises(SpikelmError, match="model .*: n_layer must be at most 4096"):
            load(str(directory), "model")


def test_a_spiking_model_that_lost_its_recipe_is_not_taken_for_a_dense_one(directory: Path) -> None:
    """Its thresholds are folded into its weights: without neurons it computes something else."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(SpikelmError, match="has a spiking model's weights, but its config.json holds no recipe"):
        load_whole(AutoModelForCausalLM, str(directory), "teacher")


@pytest.mark.parametrize(
    ("build", "fields", "message"),
    [
        (LlambaConfig, {"n_layer": 10**12}, "n_layer must be at most 4096"),
        (LlambaConfig, {"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple must be an integer >= 1; got 0"),
        (LlambaConfig, {"ssm_cfg": {"d_state": 10**12}}, "d_state must be at most 2147483647"),
        (BiSpikCLMConfig, {"T": 10**9}, "T must be at most 4096"),
        (BiSpikCLMConfig, {"num_hidden_layers": 10**9}, "num_hidden_layers must be at most 4096"),
        (SpikingBertConfig, {"hidden_size": 2**62}, "hidden_size must be at most 2147483647"),
        (SpikingBertConfig, {"T": 10**9}, "T must be at most 4096"),
    ],
)
def test_absurd_configurations(build: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SpikelmError, match=message):
        build(**fields)

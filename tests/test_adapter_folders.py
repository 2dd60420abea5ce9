"""Adapter folders from anywhere: whatever is wrong with them ends in an AdapterError, and quickly."""

from __future__ import annotations

import json
import struct

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from adapters import save_plain
from safetensors.torch import load_file, save_file

from pcg_compile.errors import AdapterError
from pcg_compile.lora.peft_folder import read_adapter

MODULES = {"layers.0.q_proj": (6, 8), "layers.0.v_proj": (6, 4)}


def fields(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def test_a_plain_folder(tmp_path):
    folder = save_plain(tmp_path / "a", MODULES, 4, lora_alpha=6)
    adapter = read_adapter(folder)
    assert list(adapter.modules) == list(MODULES)
    factors = adapter.modules["layers.0.q_proj"]
    assert factors.a.shape == (4, 6) and factors.b.shape == (8, 4) and factors.rank == 4 and factors.scaling == 1.5
    rooted = read_adapter(fields(folder, use_rslora=True)).modules["layers.0.q_proj"].scaling
    assert rooted == pytest.approx(3.0)


def test_fields_of_training_are_no_matter(tmp_path):
    folder = fields(
        save_plain(tmp_path / "a", MODULES), inference_mode=True, layers_to_transform=[0], exclude_modules=["k_proj"],
        qalora_group_size=16, loftq_config={}, runtime_config={"ephemeral_gpu_offload": False}, later_number=3,
        auto_mapping={"base_model_class": "X"}, fan_in_fan_out=True, lora_dropout=0.5,
    )  # fmt: skip
    assert set(read_adapter(folder).modules) == set(MODULES)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
        {"peft_type": "IA3"}, {"peft_type": None}, {"lora_bias": True}, {"layer_replication": [[0, 2]]},
        {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"use_qalora": True},
        {"trainable_token_indices": [1]}, {"target_parameters": ["w"]}, {"use_dora": 1}, {"bias": 0},
        {"lora_alpha": "x"}, {"lora_alpha": float("nan")}, {"lora_alpha": 1e12}, {"r": 3}, {"r": "2"}, {"r": True},
        {"rank_pattern": [1]}, {"rank_pattern": {"q_proj": 5}}, {"alpha_pattern": {"(a+)+$": 1}},
        {"use_rslora": "yes"}, {"alpha_pattern": {"q_proj\\": 1}}, {"kasa_config": {"beta": 1}}, {"later": True},
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_are_refused_by_name(tmp_path, change):
    folder = fields(save_plain(tmp_path / "a", MODULES), **change)
    (name,) = change
    with pytest.raises(AdapterError) as error:
        read_adapter(folder)
    assert name in str(error.value) or "rank" in str(error.value), error.value


def test_patterns_are_read_as_peft_reads_them(tmp_path):
    folder = fields(save_plain(tmp_path / "a", MODULES), alpha_pattern={"v_proj": 8, "0.q_proj": 6})
    scalings = {name: factors.scaling for name, factors in read_adapter(folder).modules.items()}
    assert scalings == {"layers.0.q_proj": 3.0, "layers.0.v_proj": 4.0}


def test_folders_that_are_none(tmp_path):
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    torch.save({}, tmp_path / "pickled" / "adapter_model.bin")
    for folder, text in [("nowhere", "is no folder"), ("pickled", "is a pickle"), ("a\0b", "cannot be read|is no")]:
        with pytest.raises(AdapterError, match=text):
            read_adapter(tmp_path / folder if "\0" not in folder else folder)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.q.lora_embedding_A", "base_model.model.q.lora_magnitude_vector", "q.lora_A.weight",
        "base_model.model.../../q.lora_A.weight", "base_model.model.q.lora_A.bias", "base_model.model..lora_A.weight",
    ],
)  # fmt: skip
def test_tensors_that_no_linear_layer_has(tmp_path, name):
    folder = save_plain(tmp_path / "a", MODULES)
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), name: torch.zeros(2, 6)}, file)
    with pytest.raises(AdapterError, match="no factor of a linear layer"):
        read_adapter(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path, value):
    folder = save_plain(tmp_path / "a", MODULES)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.layers.0.v_proj.lora_B.weight"][1, 1] = value
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"layers\.0\.v_proj hold NaN or infinity"):
        read_adapter(folder)


def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20),
    st.lists(st.integers(-(2**65), 2**65), max_size=4), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def bytes_of(tmp_path_factory):
    folder = save_plain(tmp_path_factory.mktemp("made") / "a", MODULES)
    return folder, (folder / "adapter_model.safetensors").read_bytes(), (folder / "adapter_config.json").read_text()


def refused(folder, weights=None, config=None):
    """Reads a damaged folder: an AdapterError, or a sound adapter after all."""
    if weights is not None:
        (folder / "adapter_model.safetensors").write_bytes(weights)
    if config is not None:
        (folder / "adapter_config.json").write_text(config)
    try:
        adapter = read_adapter(folder)
    except AdapterError:
        pass
    else:
        for factors in adapter.modules.values():
            assert factors.a.shape[0] == factors.b.shape[1] and torch.isfinite(factors.a).all()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_damaged_weights(bytes_of, data):
    folder, whole, config = bytes_of
    kind = data.draw(st.sampled_from(["cut", "flip", "length", "entry", "field", "extra"]))
    header, rest = header_of(whole)
    if kind == "cut":
        changed = whole[: data.draw(st.integers(0, len(whole) - 1))]
    elif kind == "flip":
        at = data.draw(st.integers(0, len(whole) - 1))
        changed = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
    elif kind == "length":
        changed = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1))) + whole[8:]
    elif kind == "extra":
        changed = with_header({**header, data.draw(st.text(max_size=30)): data.draw(ODD)}, rest)
    else:
        name = data.draw(st.sampled_from(sorted(header)))
        if kind == "entry":
            header[name] = data.draw(ODD)
        else:
            header[name][data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))] = data.draw(ODD)
        changed = with_header(header, rest)
    refused(folder, weights=changed, config=config)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_damaged_configurations(bytes_of, data):
    folder, whole, config = bytes_of
    if data.draw(st.booleans()):
        changed = config[: data.draw(st.integers(0, len(config) - 1))]
    else:
        names = [*json.loads(config), "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save"]
        changed = json.dumps({**json.loads(config), data.draw(st.sampled_from(names)): data.draw(ODD)})
    refused(folder, weights=whole, config=changed)


def test_sizes_are_checked_before_anything_is_read(tmp_path):
    folder = save_plain(tmp_path / "a", MODULES)
    with (folder / "adapter_config.json").open("a") as stream:
        stream.write(" " * (2 << 20))
    with pytest.raises(AdapterError, match="at most"):
        read_adapter(folder)
    folder = save_plain(tmp_path / "b", MODULES)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="no JSON"):
        read_adapter(folder)
    folder = save_plain(tmp_path / "c", MODULES)
    with (folder / "adapter_model.safetensors").open("r+b") as stream:
        stream.write(struct.pack("<Q", 1 << 40))
        stream.truncate(1 << 33)
    with pytest.raises(AdapterError, match="header alone"):
        read_adapter(folder)


def test_a_module_is_checked_before_its_weights_are_read(tmp_path):
    folder = save_plain(tmp_path / "a", MODULES, 2)
    seen = []
    read_adapter(folder, lambda *facts: seen.append(facts))
    assert seen == [("layers.0.q_proj", 6, 8, 2), ("layers.0.v_proj", 6, 4, 2)]
    file = folder / "adapter_model.safetensors"
    header, _ = header_of(file.read_bytes())
    # Gigabytes of nothing, as the header says it: a file system gives them for free.
    header = {"base_model.model.q.lora_A.weight": {}, "base_model.model.q.lora_B.weight": {}}
    size = 4 * 2 * (1 << 32)
    for i, (entry, shape) in enumerate(zip(header.values(), ([2, 1 << 32], [1 << 32, 2]), strict=True)):
        entry.update(dtype="F32", shape=shape, data_offsets=[i * size, (i + 1) * size])
    file.write_bytes(with_header(header, b""))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + 2 * size)

    def refuse(module, inputs, outputs, rank):
        raise AdapterError(f"{inputs} -> {outputs}")

    with pytest.raises(AdapterError, match="4294967296 -> 4294967296"):
        read_adapter(folder, refuse)
    file.unlink()


def test_names_that_stand_twice(tmp_path):
    folder = save_plain(tmp_path / "a", MODULES)
    file = folder / "adapter_model.safetensors"
    header, rest = header_of(file.read_bytes())
    name = sorted(header)[0]
    text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + rest)
    with pytest.raises(AdapterError, match="stands twice"):
        read_adapter(folder)


def test_links_out_of_the_folder(tmp_path):
    folder = save_plain(tmp_path / "a", MODULES)
    # The hub's cache links to its own blobs.
    cache = tmp_path / "models--x"
    snapshot = cache / "snapshots" / "abc"
    for path in (snapshot, cache / "blobs"):
        path.mkdir(parents=True)
    for i, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        (cache / "blobs" / str(i)).write_bytes((folder / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert set(read_adapter(snapshot).modules) == set(MODULES)
    (tmp_path / "linked").symlink_to(folder)
    assert set(read_adapter(tmp_path / "linked").modules) == set(MODULES)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        elsewhere = save_plain(tmp_path / f"b-{name}", MODULES)
        (elsewhere / name).unlink()
        (elsewhere / name).symlink_to(folder / name)
        with pytest.raises(AdapterError, match="link to a file outside"):
            read_adapter(elsewhere)
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to("../../../a/adapter_config.json")
    with pytest.raises(AdapterError, match="link to a file outside"):
        read_adapter(snapshot)

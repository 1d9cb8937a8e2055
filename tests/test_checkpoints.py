import gzip
import json
import pickle
import resource
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from locallip import checkpoints
from locallip.files import InputError


@contextmanager
def full_disk():
    """No file can grow beyond 4 kB: not even pytest's own log, so it must not outlast the call under test."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class OfAnotherDevice(torch.Tensor):
    """Stands for a tensor that has to be brought to the CPU."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_checkpoint_of_a_gpu_needs_none_to_be_loaded(tmp_path):
    def elsewhere():
        return torch.arange(3.0).as_subclass(OfAnotherDevice)

    optimizer = {"state": {0: {"step": elsewhere()}}, "param_groups": [{"lr": 0.1, "betas": (0.9, elsewhere())}]}
    state = OrderedDict({"0.weight": elsewhere()})
    state._metadata = nn.Linear(1, 1).state_dict()._metadata
    checkpoints.save_checkpoint(tmp_path / "net.pth", {"state_dict": state, "optimizer": optimizer, "epoch": 3})
    loaded = torch.load(tmp_path / "net.pth", weights_only=True)
    assert loaded["epoch"] == 3
    assert loaded["state_dict"]._metadata == state._metadata
    (group,) = loaded["optimizer"]["param_groups"]
    assert group["lr"] == 0.1
    kept = loaded["state_dict"]["0.weight"], loaded["optimizer"]["state"][0]["step"], group["betas"][1]
    assert all(type(tensor) is torch.Tensor and tensor.tolist() == [0, 1, 2] for tensor in kept)


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_refused_and_leaves_the_old_one(tmp_path):
    path = tmp_path / "net.pth"
    path.write_text("old")
    with pytest.raises(InputError, match="cannot write"), full_disk():
        checkpoints.save_checkpoint(path, {"state_dict": {"0.weight": torch.zeros(10_000)}})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: {"state_dict": state, "err": 0.5, "epoch": 3},
        lambda state: state,
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
    ],
    ids=["wrapped", "bare", "bare, module.", "wrapped, module."],
)
def test_load_checkpoint_takes_every_layout(tmp_path, tiny_net, layout):
    state = tiny_net.state_dict()
    torch.save(layout(state), tmp_path / "net.pth")
    loaded = checkpoints.load_checkpoint(tmp_path / "net.pth")["state_dict"]
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_load_checkpoint_keeps_what_stands_beside_the_weights(saved_net):
    checkpoint = checkpoints.load_checkpoint(saved_net)
    assert (checkpoint["err"], checkpoint["epoch"]) == (1.0, 0)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {}, {"state_dict": {}}, {"state_dict": None}, {"a": 1}, torch.zeros(3)],
    ids=["list", "empty", "empty state", "no state", "no tensors", "tensor"],
)
def test_load_checkpoint_refuses_what_holds_no_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "net.pth")


def test_load_checkpoint_refuses_weights_without_values(tmp_path):
    torch.save({"state_dict": {"0.weight": torch.zeros(3, device="meta")}}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=r"holds no values for '0\.weight'"):
        checkpoints.load_checkpoint(tmp_path / "net.pth")


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda state: without(state, "13.bias"), "it has no '13.bias'"),
        (lambda state: state | {"14.weight": torch.zeros(1)}, "'14.weight' does not belong"),
        (lambda state: state | {"13.bias": torch.zeros(11)}, r"'13.bias' is \(11,\)"),
        (lambda state: state | {"13.bias": torch.full((10,), torch.nan)}, "'13.bias' holds NaN"),
        (lambda state: state | {"13.bias": torch.full((10,), -torch.inf)}, "'13.bias' holds NaN or infinity"),
        (
            lambda state: state | {"13.bias": torch.full((10,), 1e300, dtype=torch.float64)},
            "'13.bias' holds NaN or infinity",
        ),
        (lambda state: state | {"13.bias": torch.ones(10) * 1j}, "'13.bias' is torch.complex64, .* torch.float32"),
        (lambda state: state | {"13.bias": torch.ones(10, dtype=torch.uint16)}, "'13.bias' is torch.uint16"),
        (lambda state: state | {"13.bias": torch.ones(10) > 0}, "'13.bias' is torch.bool"),
        (lambda state: state | {"13.bias": torch.ones(10).to(torch.float8_e4m3fn)}, "'13.bias' is torch.float8_e4m3fn"),
    ],
    ids=["missing", "unexpected", "shape", "NaN", "infinity", "too large", "complex", "uint16", "bool", "float8"],
)
def test_load_weights_is_all_or_nothing(tiny_net, spoil, complaint):
    before = {key: value.clone() for key, value in tiny_net.state_dict().items()}
    others = {key: value + 1 for key, value in before.items()}
    with pytest.raises(InputError, match=f"file.pth is .*{complaint}"):
        checkpoints.load_weights(tiny_net, spoil(others), "file.pth")
    assert all(torch.equal(value, before[key]) for key, value in tiny_net.state_dict().items())


def test_load_weights_loads_every_tensor(tiny_net):
    others = {key: value + 1 for key, value in tiny_net.state_dict().items()}
    checkpoints.load_weights(tiny_net, others, "file.pth")
    assert all(torch.equal(value, others[key]) for key, value in tiny_net.state_dict().items())


# --- what other tools put around weights, and beside them


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compile_a_layer(net):
    net[2] = torch.compile(net[2])
    return net


WRAPPED = {
    "_orig_mod.0.weight": torch.compile,
    "2._orig_mod.weight": compile_a_layer,
    "module.0.weight": nn.DataParallel,
    "module._orig_mod.0.weight": lambda net: DistributedDataParallel(torch.compile(net)),
    "_orig_mod.module.0.weight": lambda net: torch.compile(DistributedDataParallel(net)),
    "module._orig_mod.2._orig_mod.weight": lambda net: nn.DataParallel(torch.compile(compile_a_layer(net))),
}


@pytest.mark.parametrize("key", WRAPPED)
def test_weights_of_wrapped_models_have_the_names_of_the_bare_one(tmp_path, tiny_net, one_process, key):
    expected = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    state = WRAPPED[key](tiny_net).state_dict()
    assert key in state
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    loaded = checkpoints.load_checkpoint(tmp_path / "net.pth")["state_dict"]
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_parameters_as_fsdp_names_them_have_the_names_of_the_bare_model(tmp_path, tiny_net):
    torch.save({f"_fsdp_wrapped_module.{k}": v for k, v in tiny_net.state_dict().items()}, tmp_path / "net.pth")
    assert checkpoints.load_checkpoint(tmp_path / "net.pth")["state_dict"].keys() == tiny_net.state_dict().keys()


@pytest.mark.parametrize("wrapper", ["model", "net", "module_", "0.modules"])
def test_only_names_of_wrappers_are_dropped(tmp_path, wrapper):
    torch.save({f"{wrapper}.weight": torch.zeros(1)}, tmp_path / "net.pth")
    assert [*checkpoints.load_checkpoint(tmp_path / "net.pth")["state_dict"]] == [f"{wrapper}.weight"]


def test_a_weight_that_is_called_like_a_wrapper_keeps_its_name(tmp_path):
    torch.save({"0.module": torch.zeros(1), "module": torch.ones(1)}, tmp_path / "net.pth")
    assert [*checkpoints.load_checkpoint(tmp_path / "net.pth")["state_dict"]] == ["0.module", "module"]


def refused(path):
    """The line with which a checkpoint is refused."""
    with pytest.raises(InputError) as error:
        checkpoints.load_checkpoint(path)
    (line,) = str(error.value).splitlines()
    return line


def test_two_weights_of_one_name_are_refused(tmp_path):
    torch.save({"module.0.weight": torch.zeros(1), "0._orig_mod.weight": torch.ones(1)}, tmp_path / "net.pth")
    assert "'0.weight' twice, as 'module.0.weight' and '0._orig_mod.weight'" in refused(tmp_path / "net.pth")


NUMBERS = [
    np.float64(0.1),
    np.float32(0.5),
    np.float16(-2),
    np.float64(0.5).astype(">f8"),
    np.int64(-3),
    np.uint8(200),
    np.bool_(True),
    np.bool_(False),
    np.complex128(1 + 2j),
    np.str_("ε = 1"),
]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_beside_the_weights_are_taken(tmp_path, tiny_net, number, zipped):
    content = {"state_dict": tiny_net.state_dict(), "err": number, "all": [number, {"again": number}]}
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    loaded = checkpoints.load_checkpoint(tmp_path / "net.pth")
    assert loaded["err"] == number
    assert loaded["all"] == [number, {"again": number}]
    assert type(loaded["err"]) is type(number.item())


def test_numbers_that_numpy_1_wrote_are_taken(tmp_path, tiny_net):
    torch.save({"state_dict": tiny_net.state_dict(), "err": np.float64(0.25)}, tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "net.pth", "w") as old:
        for name in new.namelist():
            content = new.read(name)
            assert name != "new/data.pkl" or b"core.multiarray" in content
            old.writestr(name, content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    assert checkpoints.load_checkpoint(tmp_path / "net.pth")["err"] == 0.25


def test_a_namespace_beside_the_weights_is_taken(tmp_path, tiny_net):
    arguments = Namespace(lr=np.float64(0.1), layers=[1, 2], name="net")
    torch.save({"state_dict": tiny_net.state_dict(), "args": arguments}, tmp_path / "net.pth")
    assert checkpoints.load_checkpoint(tmp_path / "net.pth")["args"] == arguments


class Marks:
    """When unpickled, leaves a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


class DtypeWithCode:
    """Pickles as a call of numpy.dtype with what numpy.dtype would take but no number has."""

    def __reduce__(self):
        return np.dtype, ("O",)


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_file_runs(tmp_path, tiny_net, zipped):
    content = {"state_dict": tiny_net.state_dict(), "x": Marks(tmp_path / "ran")}
    torch.save(content, tmp_path / "net.pth", _use_new_zipfile_serialization=zipped)
    assert "open" in refused(tmp_path / "net.pth")
    assert not (tmp_path / "ran").exists()


def test_types_of_numpy_that_are_no_numbers_are_not_taken(tmp_path, tiny_net):
    torch.save({"state_dict": tiny_net.state_dict(), "x": DtypeWithCode()}, tmp_path / "net.pth")
    refused(tmp_path / "net.pth")


def test_what_is_taken_here_stays_forbidden_elsewhere(tmp_path, tiny_net):
    torch.save({"state_dict": tiny_net.state_dict(), "err": np.float64(0.1)}, tmp_path / "net.pth")
    checkpoints.load_checkpoint(tmp_path / "net.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "net.pth", weights_only=True)


# --- state dicts under other keys


@pytest.mark.parametrize("key", ["model", "model_state_dict", "net"])
def test_the_only_state_dict_of_a_file_is_taken_whatever_its_key(tmp_path, tiny_net, key):
    state = tiny_net.state_dict()
    optimizer = torch.optim.Adam(tiny_net.parameters()).state_dict()
    torch.save({key: state, "optimizer": optimizer, "epoch": 3, "empty": {}}, tmp_path / "net.pth")
    loaded = checkpoints.load_checkpoint(tmp_path / "net.pth")
    assert loaded["state_dict"].keys() == state.keys()
    assert loaded["epoch"] == 3


def test_of_several_state_dicts_none_is_taken_and_all_are_named(tmp_path, tiny_net):
    torch.save({"model": tiny_net.state_dict(), "ema": tiny_net.state_dict(), "epoch": 3}, tmp_path / "net.pth")
    assert "several state dicts, 'model', 'ema'; keep the one" in refused(tmp_path / "net.pth")


def test_state_dict_is_the_key_that_counts(tmp_path, tiny_net):
    torch.save({"ema": {"x": torch.zeros(1)}, "state_dict": tiny_net.state_dict()}, tmp_path / "net.pth")
    assert checkpoints.load_checkpoint(tmp_path / "net.pth")["state_dict"].keys() == tiny_net.state_dict().keys()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"weights": [1], "epoch": 3}, "but 'weights', 'epoch';"),
        ({str(i): i for i in range(9)}, "but '0', '1', '2', '3', '4', ...;"),
        ({"state_dict": {"model": {"0.weight": torch.zeros(1)}}}, "under 'state_dict', but 'model';"),
        ({"0.weight": torch.zeros(1), "epoch": 3}, "but '0.weight', 'epoch';"),
        ([1], "but a list;"),
        ({"0.weight": torch.zeros(1).to_sparse()}, "'0.weight' is a torch.sparse_coo;"),
    ],
    ids=["other keys", "many keys", "nested", "mixed", "list", "sparse"],
)
def test_a_refusal_names_what_was_found_and_the_way_out(tmp_path, content, found):
    torch.save(content, tmp_path / "net.pth")
    line = refused(tmp_path / "net.pth")
    assert found in line
    assert "torch.save({'state_dict': model.state_dict()}, FILE)" in line


def test_a_part_of_a_tensor_is_not_taken_for_the_whole(tmp_path, tiny_net, one_process):
    fully_shard(tiny_net, mesh=init_device_mesh("cpu", (1,)))
    torch.save(tiny_net.state_dict(), tmp_path / "net.pth")
    assert "is a DTensor" in refused(tmp_path / "net.pth")


def test_a_longer_name_of_a_missing_weight_is_named(tiny_net):
    state = {f"net.{key}": value for key, value in tiny_net.state_dict().items()}
    with pytest.raises(InputError, match=r"it has no '0\.weight', only 'net\.0\.weight'"):
        checkpoints.load_weights(tiny_net, state, "file.pth")


# --- files of other kinds


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def pickled(**content):
    return lambda path: torch.save({"state_dict": nn.Linear(2, 2).state_dict()} | content, path)


def safetensors(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def export(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.rand(1, 2),)), path.with_suffix(".pt2"))
    path.with_suffix(".pt2").rename(path)


def save_arrays(path):
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(2))


OTHERS = {
    "whole model": (lambda path: torch.save(nn.Sequential(nn.Linear(2, 2)), path), "a whole pickled model"),
    "model of a class": (lambda path: torch.save(Net(), path), "a whole pickled model"),
    "old whole model": (
        lambda path: torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=False),
        "a whole pickled model",
    ),
    "array": (pickled(a=np.zeros(2)), "core.multiarray._reconstruct, numpy.ndarray,"),
    "path": (pickled(args=Namespace(out=PurePosixPath("x"))), "it holds pathlib"),
    "TorchScript": (lambda path: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path), "a TorchScript archive"),
    "export": (export, "a program of torch.export"),
    "safetensors": (safetensors, "a safetensors file; convert it"),
    "arrays": (save_arrays, "a zip archive of other files"),
    "npy": (lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"), "an array of NumPy"),
    "HDF5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "a pickle that torch.save did not write"),
    "old pickle": (lambda path: path.write_bytes(pickle.dumps([1], 2)), "a pickle that torch.save did not write"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "compressed by gzip"),
    "LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html><title>404</title>"), "a web page"),
    "empty": (lambda path: path.write_bytes(b""), "is damaged"),
    "text": (lambda path: path.write_text("{}"), "is damaged"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, kind):
    write, name = OTHERS[kind]
    write(tmp_path / "net.pth")
    before = (tmp_path / "net.pth").read_bytes()
    assert name in refused(tmp_path / "net.pth")
    assert (tmp_path / "net.pth").read_bytes() == before


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_called_damaged(tmp_path, tiny_net, zipped, share):
    path = tmp_path / "net.pth"
    torch.save(tiny_net.state_dict(), path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is damaged" in refused(path)


def test_a_file_that_may_not_be_read_is_not_called_damaged(tmp_path, saved_net, monkeypatch):
    def refuse(*arguments, **named):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert refused(saved_net) == f"cannot read {saved_net}: Permission denied"


@pytest.mark.parametrize(
    ("name", "there"), [("nets/mnist_4C3f", "nets/mnist_4C3F"), ("nets", "nets/cifar, nets/mnist_4C3F"), ("nets/x", "")]
)
def test_a_name_without_a_checkpoint_is_refused_with_what_it_may_have_meant(name, there, tmp_path):
    (tmp_path / "nets").mkdir()
    for prefix in ("mnist_4C3F", "cifar"):
        (tmp_path / "nets" / f"{prefix}_best.pth").touch()
    with pytest.raises(InputError, match="is a file") as refusal:
        checkpoints.find_checkpoint(str(tmp_path / name))
    assert str(refusal.value).replace(f"{tmp_path}/", "").partition("; there is ")[2] == there

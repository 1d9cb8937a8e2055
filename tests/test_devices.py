"""Devices by name."""

import pytest
import torch

from locallip import devices
from locallip.files import InputError


@pytest.mark.parametrize("name", ["cpu", "auto"])
def test_select_device_takes_what_is_there(name):
    assert torch.zeros(1, device=devices.select_device(name)).item() == 0


def test_auto_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.select_device("auto") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "meta", "", "cuda:x"])
def test_select_device_refuses_what_is_not(name):
    with pytest.raises(InputError, match="device"):
        devices.select_device(name)


def test_tf32_is_as_it_was_behind_what_it_is_allowed_for():
    before = torch.backends.cuda.matmul.allow_tf32
    with devices.tf32(True):
        assert torch.backends.cuda.matmul.allow_tf32
        with devices.tf32(False):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before
    with pytest.raises(RuntimeError, match="inside"), devices.tf32(not before):
        raise RuntimeError("inside")
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_hardware_names_the_threads_of_a_cpu():
    threads = torch.get_num_threads()
    assert devices.hardware(torch.device("cpu")).startswith(f"CPU, {threads} thread")

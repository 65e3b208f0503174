"""What tests of several modules share."""

from functools import cache

import pytest
from fake_cuda import FakeCuda

from specdec_rt import Pipeline
from specdec_rt.backends.cuda import CudaDevice
from specdec_rt.backends.onnxruntime import OnnxRuntimeBackend
from specdec_rt.bundle import load_bundle


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command line in an empty folder; returns exit code, stdout, stderr."""
    from specdec_rt import cli  # most tests need no command

    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return caught.value.code, printed.out, printed.err

    return command


@pytest.fixture(scope="session")
def make_gpu():
    """Makes the device of a GPU on a driver that stands in for NVIDIA's, as no GPU is needed here; gives both."""

    def make(kind=CudaDevice, *, batch_buckets, graphs=True):
        cuda = FakeCuda()
        with pytest.MonkeyPatch.context() as monkeypatch:
            cuda.install(monkeypatch)
            return cuda, kind(batch_buckets=batch_buckets, graphs=graphs)  # once it is made it imports nothing

    return make


@pytest.fixture(scope="session")
def cpu():
    """Gives a bundle's pipeline on one core of the CPU, always the same one of a tuning."""

    @cache
    def pipeline(name="digits", tuning=None):
        return Pipeline(load_bundle(name), OnnxRuntimeBackend(threads=1), tuning=tuning)

    return pipeline

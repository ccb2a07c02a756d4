import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from hub_server import HubServer

# Before anything imports huggingface_hub, which reads its settings once: the only Hub there is is our own.
_server = HubServer()
_home = tempfile.TemporaryDirectory()
for _name in [name for name in os.environ if name.startswith(('HF_', 'HUGGING_FACE_'))]:
    del os.environ[_name]
os.environ.update(
    HF_ENDPOINT=_server.endpoint,
    HF_HOME=_home.name,
    HF_HUB_DISABLE_XET='1',
    HF_HUB_DISABLE_TELEMETRY='1',
    HF_HUB_DISABLE_UPDATE_CHECK='1',
    HF_HUB_DISABLE_PROGRESS_BARS='1',
    NETWORK_GUARD_LOG=os.path.join(_home.name, 'network.log'),
)
_guard = Path(__file__).resolve().parent / 'guard'
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(_guard), os.environ.get('PYTHONPATH')]))
runpy.run_path(str(_guard / 'sitecustomize.py'))

import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # as fast for small tensors, and threads that wait for each other spin beside busy processes


if hasattr(huggingface_hub, 'configure_http_backend'):  # 0.x: a card is checked at a fixed address
    import requests
    from huggingface_hub.utils._http import _default_backend_factory

    class _ToOwnHub(requests.adapters.HTTPAdapter):
        def send(self, request, *args, **kwargs):
            request.url = request.url.replace('https://huggingface.co', _server.endpoint)
            return super().send(request, *args, **kwargs)

    def _session():
        session = _default_backend_factory()
        session.mount('https://huggingface.co', _ToOwnHub())
        return session

    huggingface_hub.configure_http_backend(_session)


_OUTSIDE = {'hub', 'run', 'timm_scripts'}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark each test as gpu, integration or unit, by what it needs; a mark of its own goes before."""
    for item in items:
        needs = [mark.kwargs.get('reason', '') for mark in item.iter_markers('skipif')]
        if any(re.search('CUDA|GPU', reason) for reason in needs):
            item.add_marker('gpu')
        elif not any(item.get_closest_marker(name) for name in ('gpu', 'integration', 'unit')):
            item.add_marker('integration' if _OUTSIDE & {*item.fixturenames} else 'unit')


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network():
    """Fails a test that tried to reach another machine, also from a process of its own."""
    log = Path(os.environ['NETWORK_GUARD_LOG'])
    log.write_text('')
    yield
    assert log.read_text() == ''


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub without repositories, and an empty cache."""
    from huggingface_hub import constants

    _server.reset()
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'cache'))  # for other processes
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    return _server


@pytest.fixture
def go_offline(hub, monkeypatch):
    """Put the client offline when called, as HF_HUB_OFFLINE=1 does at its start."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    reset = getattr(_http, 'reset_sessions', lambda: None)  # of 0.x, which asks when it opens a session

    def _go_offline():
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
        reset()

    yield _go_offline
    reset()


@pytest.fixture(params=[0o022, 0o027], ids=oct)
def umask(request):
    """Run a test under each of two umasks."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.fixture(scope='session')
def root():
    """The checkout that the tests belong to."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def beetles(tmp_path_factory):
    """An ImageFolder tree of a dozen tiny images per class for training, four for validation; 12 classes."""
    from timm_zzz.cli.demo import FINE, draw_classes

    folder = tmp_path_factory.mktemp('beetles')
    for split, images in (('train', 12), ('validation', 4)):
        draw_classes(folder / split, FINE, images, seed=f'0 {split}')
    return folder


@pytest.fixture(scope='session')
def backbone(tmp_path_factory):
    """Weights of a linear test_resnet of 1000 classes."""
    import timm
    import torch
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp('backbone') / 'test_resnet.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet').state_dict(), file)
    return file


@pytest.fixture
def run(tmp_path):
    """Run a command line with this Python in a process of its own, away from the checkout."""

    def _run(*args, check=True, **kwargs):
        env = {**os.environ, 'OMP_NUM_THREADS': '1', **kwargs.pop('env', {})}
        result = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=kwargs.pop('timeout', 600),
            **kwargs,
        )
        if check:
            assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
        return result

    return _run


@pytest.fixture(scope='session')
def timm_scripts():
    """Folder with timm's train.py and validate.py."""
    folder = os.environ.get('TIMM_SCRIPTS')
    if not folder:
        pytest.skip('TIMM_SCRIPTS does not name a clone of huggingface/pytorch-image-models')
    assert (Path(folder) / 'train.py').is_file(), f'TIMM_SCRIPTS={folder} has no train.py'
    return Path(folder)

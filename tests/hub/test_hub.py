"""Models to and from a Hub of our own (hub_server.py), with the unmodified client, and what happens when it fails."""

import errno
import json
import resource
import struct
import time
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub_errors
from oracles import distinct
from safetensors.torch import load_file, save, save_file
from torch.nn import functional as F

import timm_zzz
from timm_zzz import ZZZHead, from_pretrained, push_to_hub, save_pretrained
from timm_zzz.errors import AccessError, CheckpointError, ConfigError, NotFoundError, UnavailableError
from timm_zzz.head import ROW_STD
from timm_zzz.hub import load
from timm_zzz.hub.cards import model_card
from timm_zzz.models import _timm
from timm_zzz.models.predict import percentiles_of

REPO = 'owner/birds-zzz'

# name: architecture and create_model's arguments
MODELS = {
    'plain ViT, r 8': ('test_vit.zzz_r8', dict(num_classes=5)),
    'r 16': ('test_vit.r160_in1k.zzz_r16', dict(num_classes=5, zzz_v_init=0.3)),
    'r 0': ('test_vit.zzz_r8', dict(num_classes=5, zzz_rank=0)),
    'convolutional classifier': ('dla46_c.zzz_r8', dict(num_classes=5)),
    'distilled': ('deit_tiny_distilled_patch16_224.zzz_r4', dict(num_classes=5)),
    'in_chans': ('test_resnet.zzz_r8', dict(num_classes=5, in_chans=1)),
    'image size': ('test_vit.zzz_r8', dict(num_classes=5, img_size=96)),
    'bfloat16': ('test_convnext.zzz_r8', dict(num_classes=5)),
    'features': ('test_resnet.zzz_r8', dict(num_classes=0)),
}


def create(case='plain ViT, r 8'):
    name, kwargs = MODELS[case]
    model = timm.create_model(name, **kwargs)
    for module in model.modules():
        if isinstance(module, ZZZHead):  # away from every start value
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter)
    return model.to(torch.bfloat16) if case == 'bfloat16' else model


def image(model):
    return torch.randn(2, *preprocessing(model)['input_size'])


def preprocessing(model):
    config = getattr(timm.data, 'resolve_input_data_config', _timm.input_config)(model)
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}  # JSON has lists


def from_timm(repo_id, **kwargs):
    return timm.create_model(f'hf-hub:{repo_id}', pretrained=True, **kwargs)


def assert_same(got, model):
    expected = model.state_dict()
    assert got.state_dict().keys() == expected.keys()
    for key, value in got.state_dict().items():
        assert torch.equal(value, expected[key].to(value.dtype)), key
    x = image(model)
    torch.testing.assert_close(got.eval()(x), model.float().eval()(x))
    assert preprocessing(got) == preprocessing(model)


WRITERS = {
    'timm_zzz': lambda model, folder: push_to_hub(model, REPO),
    'timm': lambda model, folder: timm.models.push_to_hf_hub(model, REPO, safe_serialization=True),
    'timm_zzz, folder': lambda model, folder: save_pretrained(model, folder),
    'timm, folder': lambda model, folder: timm.models.save_for_hf(model, str(folder), safe_serialization=True),
}


# A folder holds what a repository does, so the quick run writes one kind of model to it
EXCHANGES = [
    pytest.param(writer, case, marks=pytest.mark.slow if 'folder' in writer and case != 'r 16' else ())
    for writer in WRITERS
    for case in MODELS
    if _timm.SAVES_ARGS or 'timm_zzz' in writer  # timm's own functions save no arguments before 1.0.31
]


@pytest.mark.parametrize('writer, case', EXCHANGES)
def test_exchange_with_timm(hub, tmp_path, writer, case):
    """Both packages read what either one writes, and get the same model."""
    model = create(case)
    WRITERS[writer](model, tmp_path / 'folder')
    place, source = (tmp_path / 'folder', 'local-dir') if 'folder' in writer else (REPO, 'hf-hub')
    assert_same(from_pretrained(place), model)
    assert_same(timm.create_model(f'{source}:{place}', pretrained=True), model)


@pytest.mark.parametrize('case', ['plain ViT, r 8', 'convolutional classifier', 'distilled', 'features'])
def test_other_classes_on_reload(hub, case):
    """The head starts anew, the backbone is kept."""
    model = create(case)
    push_to_hub(model, REPO)
    for read in (from_pretrained, from_timm):
        for num_classes in (7, 0):
            again = read(REPO, num_classes=num_classes)
            classifier = again.get_classifier()
            heads = classifier if isinstance(classifier, tuple) else [classifier]
            if num_classes:
                assert {(head.num_classes, head.rank) for head in heads} == {(7, int(MODELS[case][0][-1]))}
                assert all(abs(head.weight.std() - ROW_STD) < ROW_STD / 2 and not head.bias.any() for head in heads)
            else:
                assert not any(isinstance(head, ZZZHead) for head in heads)
            assert again.eval()(image(model)).shape[1] == (num_classes or again.num_features)
            expected, got = model.state_dict(), again.state_dict()
            paths = {path for path, module in again.named_modules() if module in heads}
            backbone = [key for key in got if not any(key.startswith(f'{path}.') for path in paths)]
            assert len(backbone) > 20 and all(torch.equal(got[key], expected[key]) for key in backbone)


def test_other_input_and_rank_on_reload(hub):
    push_to_hub(create('image size'), REPO)
    for read in (from_pretrained, from_timm):
        assert read(REPO, in_chans=1)(torch.randn(1, 1, 96, 96)).shape == (1, 5)
        assert read(REPO, img_size=128)(torch.randn(1, 3, 128, 128)).shape == (1, 5)
        assert read(REPO, dtype=torch.bfloat16).get_classifier().A.dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match='rank 8 -> 4'):
        from_pretrained(REPO, zzz_rank=4)


@pytest.mark.parametrize(
    'name, kwargs',
    [
        ('test_vit.zzz_r8', dict(depth=2, embed_dim=96, num_heads=4, mlp_ratio=2.5)),
        ('test_vit.zzz_r8', dict(depth=20)),
        ('test_convnext.zzz_r8', dict(depths=[1, 1, 3, 1], dims=[16, 16, 32, 32])),
        ('resnet10t.zzz_r8', dict(stem_width=16, layers=[1, 2, 1, 1], channels=[16, 16, 32, 64])),
        ('swin_tiny_patch4_window7_224.zzz_r8', dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=14)),
    ],
)
def test_models_of_other_sizes(hub, name, kwargs):
    """Arguments that size the backbone are held against the weights."""
    model = distinct(timm.create_model(name, num_classes=5, **kwargs))
    push_to_hub(model, REPO)
    assert_same(from_pretrained(REPO), model)
    assert_same(from_timm(REPO), model)
    assert from_pretrained(REPO, num_classes=7).num_classes == 7


def test_the_form_of_the_logits_is_recorded(tmp_path):
    model = distinct(timm.create_model('test_vit.zzz_r4', num_classes=5, zzz_log_density=True))
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['zzz_log_density'] is True
    for again in (from_pretrained(tmp_path), timm.create_model(f'local-dir:{tmp_path}', pretrained=True)):
        assert_same(again, model)
        assert again.head.log_density
    assert 'tfrac{d}{2}' in str(model_card(model, REPO))


def test_the_start_is_kept_for_other_classes(tmp_path):
    """A config.json without a start keeps its options, too: it is older than the flat start."""
    options = dict(num_classes=5, zzz_init='reference')
    named = timm.create_model('test_vit.zzz_r4', **options)
    attached = timm_zzz.attach(timm.create_model('test_vit', num_classes=5), rank=4, init='reference')
    for model in (named, attached):
        save_pretrained(model, tmp_path)
        args = json.loads((tmp_path / 'config.json').read_text())['model_args']
        assert args['zzz_init'] == 'reference' and 'zzz_sigma2_init' not in args
        assert_same(from_pretrained(tmp_path), model)
        assert not from_pretrained(tmp_path, num_classes=7).head.v_raw.any()
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['model_args']['zzz_init']
    config['model_args']['zzz_sigma2_init'] = 1 / 8
    (tmp_path / 'config.json').write_text(json.dumps(config))
    assert_same(from_pretrained(tmp_path), attached)
    again = from_pretrained(tmp_path, num_classes=7).head
    assert F.softplus(again.sigma2_raw).item() + again.sigma2_min == pytest.approx(1 / 8)


def test_models_changed_after_create_model(tmp_path):
    attached = distinct(timm_zzz.attach(timm.create_model('test_resnet', num_classes=5), rank=3, v_min=1e-3))
    resized = create()
    resized.reset_classifier(7)
    if _timm.SAVES_ARGS:  # timm before 1.0.31 does not record it
        resized.set_input_size(img_size=128)
    tied = create('in_chans').to(memory_format=torch.channels_last)
    tied.layer1[0].bn1.bias = tied.layer1[0].bn2.bias
    assert not all(tensor.is_contiguous() for tensor in tied.state_dict().values())
    for model in (attached, resized, tied):
        save_pretrained(model, tmp_path)
        again = from_pretrained(tmp_path)
        assert_same(again, model)
        assert again.get_classifier().v_min == model.get_classifier().v_min
    assert tied.layer1[0].bn1.bias is tied.layer1[0].bn2.bias


def test_files_have_the_mode_of_new_files(tmp_path, umask):
    save_pretrained(create(), tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~umask}


def test_wrapped_and_non_finite(tmp_path):
    model = create()
    model.head.bias.data[:3] = torch.tensor([float('nan'), float('inf'), -float('inf')])
    save_pretrained(torch.compile(model), tmp_path)
    assert from_pretrained(tmp_path).head.bias.isnan().tolist() == [True, False, False, False, False]


def test_label_names(hub, tmp_path):
    for names in (['Käfer', 'b|c', '</script>', 'd', 'e'], dict(enumerate('abcde'))):
        push_to_hub(create(), REPO, label_names=names)
        for model in (from_pretrained(REPO), timm.create_model(f'hf-hub:{REPO}')):
            assert model.pretrained_cfg['label_names'] == [names[i] for i in range(5)]
    for names, what in (
        (['a'], '1 names for 5 classes'),
        ('abcde', 'one string per class'),
        ([*range(5)], 'one string'),
        ({1: 'a'}, 'keys 0'),
    ):
        with pytest.raises(ValueError, match=f'label_names: .*{what}'):
            save_pretrained(create(), tmp_path / 'folder', label_names=names)


def test_wrong_models(hub, tmp_path):
    replaced, shortened = create(), create()
    replaced.head = torch.nn.Linear(64, 5)
    dicts = timm.create_model('resnet10t.zzz_r8', block_args=dict(attn_layer='se'))
    shortened.blocks = shortened.blocks[:1]
    for model, error, what in (
        (timm.create_model('test_resnet'), ValueError, 'ResNet has no ZZZ head'),
        (torch.nn.Linear(2, 2), ValueError, 'made by timm.create_model'),
        (replaced, ValueError, 'replaced by Linear'),
        (shortened, CheckpointError, 'model_args'),
        (
            dicts,
            ConfigError,
            "^from_pretrained would refuse this model: model_args.block_args: got {'attn_layer': 'se'}",
        ),
    ):
        with pytest.raises(error, match=what):
            save_pretrained(model, tmp_path / 'folder')
        with pytest.raises(error, match=what):
            push_to_hub(model, REPO)
    assert not hub.exists(REPO) and not list((tmp_path / 'folder').iterdir())


# --- where it is ------------------------------------------------------------------------------------------------------


def test_revisions(hub):
    api = HfApi()
    models = [create() for _ in range(3)]
    first = push_to_hub(models[0], REPO)
    api.create_tag(REPO, tag='v1')
    api.create_branch(REPO, branch='next')
    push_to_hub(models[1], REPO, revision='next')
    request = push_to_hub(models[2], REPO, create_pr=True)
    assert request.pr_url and request.pr_revision == 'refs/pr/1'
    for revision, i in {None: 0, 'v1': 0, first.oid: 0, 'next': 1, 'refs/pr/1': 2}.items():
        assert torch.equal(from_pretrained(REPO, revision=revision).head.A, models[i].head.A)
    assert torch.equal(from_pretrained(f'hf-hub:{REPO}@next').head.A, models[1].head.A)
    assert torch.equal(from_timm(f'{REPO}@next').head.A, models[1].head.A)
    assert from_pretrained(REPO).pretrained_cfg['hf_hub_id'] == f'{REPO}@{first.oid}'
    with pytest.raises(ValueError, match='revision'):
        from_pretrained(f'{REPO}@next', revision='v1')
    with pytest.raises(NotFoundError, match=f'{REPO} has no revision v2'):
        from_pretrained(REPO, revision='v2')
    with pytest.raises(NotFoundError, match='has no revision nowhere'):
        push_to_hub(models[0], REPO, revision='nowhere')


def test_private_repository(hub, monkeypatch):
    model = create()
    push_to_hub(model, REPO, private=True)
    assert_same(from_pretrained(REPO, token='hf_owner'), model)
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', f'{constants.HF_HUB_CACHE}-2')
    for token in (None, False, 'hf_guest'):
        with pytest.raises(NotFoundError, match='private: check the name, or pass a token') as e:
            from_pretrained(REPO, token=token)
        assert isinstance(e.value.__cause__, hub_errors.RepositoryNotFoundError)


def test_cache_folder_and_offline(hub, tmp_path, go_offline):
    model = create()
    push_to_hub(model, REPO)
    from_pretrained(REPO, cache_dir=tmp_path / 'mine')
    assert not (tmp_path / 'cache').exists()
    seen = len(hub.requests)
    assert_same(from_pretrained(REPO, cache_dir=tmp_path / 'mine', local_files_only=True), model)
    assert len(hub.requests) == seen
    with pytest.raises(UnavailableError, match='cache has no config.json'):
        from_pretrained(REPO, local_files_only=True)
    go_offline()
    from_pretrained(REPO, cache_dir=tmp_path / 'mine')
    with pytest.raises(UnavailableError, match='owner/birds-zzz: the Hub is offline'):
        from_pretrained(REPO, cache_dir=tmp_path / 'empty')
    assert len(hub.requests) == seen


def test_readme_of_the_repository_stays_and_further_files(hub, tmp_path):
    push_to_hub(create(), REPO)
    hub.commit(REPO, {'README.md': b'---\nlicense: mit\n---\nmine'})
    push_to_hub(create(), REPO)
    assert hub.files(REPO)['README.md'].endswith(b'mine')
    push_to_hub(create(), REPO, card='---\nlicense: mit\n---\nnew')
    assert hub.files(REPO)['README.md'].endswith(b'new')
    (tmp_path / 'x').write_text('1')
    push_to_hub(create(), REPO, files={'train/args.yaml': tmp_path / 'x'})
    assert hub.files(REPO)['train/args.yaml'] == b'1'
    assert set(hub.files(REPO)) >= {'README.md', 'config.json', 'model.safetensors'}
    for name in ('config.json', '/etc/x', '../x'):
        with pytest.raises(ValueError, match='files: '):
            push_to_hub(create(), REPO, files={name: tmp_path / 'x'})


@pytest.mark.slow  # a Python process; tests/models/test_registry.py does the same with a folder
def test_without_the_plugin_it_fails_by_name(hub, run):
    push_to_hub(create(), REPO)
    for pretrained in (True, False):
        script = f'import timm; timm.create_model("hf-hub:{REPO}", pretrained={pretrained})'
        assert 'zzz_' in run('-c', script, check=False).stderr.splitlines()[-1]


def test_xet(hub, tmp_path, monkeypatch):
    """The storage that the client prefers on x86-64, with its chunks on the local disk."""
    pytest.importorskip('hf_xet')
    hub.xet_dir = tmp_path / 'xet'
    monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', False)
    model = create()
    push_to_hub(model, REPO)
    assert_same(from_pretrained(REPO), model)
    paths = '\n'.join(request.path for request in hub.requests)
    assert 'xet-write-token' in paths and 'xet-read-token' in paths and '\n/storage/' not in paths


# --- the table of failures --------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """The files of a model, by name."""
    folder = save_pretrained(create(), tmp_path_factory.mktemp('saved'))
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def pushed(hub, saved, monkeypatch):
    """A repository with a model in it, and a client whose pauses between its attempts take no time."""
    monkeypatch.setattr('huggingface_hub.utils._http.time.sleep', lambda seconds: None)
    hub.add_repo(REPO, saved)
    return hub


def test_malformed_names(hub, tmp_path):
    with pytest.raises(ValueError):
        from_pretrained('a/b/c')
    with pytest.raises(ValueError):
        push_to_hub(create(), 'a b')
    for place in (f'local-dir:{tmp_path}/no', tmp_path / 'no'):
        with pytest.raises(NotFoundError, match='no such folder'):
            from_pretrained(place)
    with pytest.raises(NotFoundError, match='has no config.json'):
        from_pretrained(tmp_path)


BAD_TOKEN = dict(status=401, message='Invalid credentials in Authorization header')
NO_WEIGHTS = dict(files={'pytorch_model.bin': b'pickle'}, delete=['model.safetensors'])
OTHER_WEIGHTS = dict(files={'model.safetensors': save({'x': torch.zeros(3)})})
# What happens to the Hub, what is loaded, the error and its message
REFUSALS = [
    (lambda hub: None, 'owner/nothing', NotFoundError, 'owner/nothing: no such repository, or it is private.*a token'),
    (lambda hub: hub.fault('/resolve/', 'status', **BAD_TOKEN), REPO, AccessError, 'token'),
    (lambda hub: hub.add_repo('other/x', hub.files(REPO), gated=True), 'other/x', AccessError, 'gated'),
    (lambda hub: hub.add_repo('other/x', hub.files(REPO), disabled=True), 'other/x', AccessError, 'disabled'),
    (lambda hub: hub.commit(REPO, **NO_WEIGHTS), REPO, NotFoundError, 'has no model.safetensors: only safetensors'),
    (lambda hub: hub.commit(REPO, **OTHER_WEIGHTS), REPO, CheckpointError, 'no head'),
]


@pytest.mark.parametrize('change, repo_id, error, what', REFUSALS, ids=[case[-1] for case in REFUSALS])
def test_refusals(pushed, change, repo_id, error, what):
    change(pushed)
    with pytest.raises(error, match=what) as e:
        from_pretrained(repo_id)
    if error is AccessError:
        assert isinstance(e.value.__cause__, (hub_errors.HfHubHTTPError, hub_errors.LocalEntryNotFoundError))


def test_no_right_to_push(pushed):
    for repo_id, token in (('other/new', 'hf_owner'), (REPO, 'hf_guest'), ('owner/new', 'hf_nobody')):
        with pytest.raises(AccessError, match='no right to do this') as e:
            push_to_hub(create(), repo_id, token=token)
        assert isinstance(e.value.__cause__, hub_errors.HfHubHTTPError)
    assert not pushed.exists('other/new') and not pushed.exists('owner/new')
    assert 'hf_guest' not in str(e.value)


@pytest.mark.parametrize('match', ['config.json', 'model.safetensors', '/storage/'])
@pytest.mark.parametrize('fault', ['drop', 'status', 'refused'])
def test_unavailable(pushed, fault, match, monkeypatch):
    if fault == 'refused':
        template = 'http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}'
        monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
        for place in ('constants', 'file_download'):  # the latter in huggingface_hub 0.x
            monkeypatch.setattr(f'huggingface_hub.{place}.HUGGINGFACE_CO_URL_TEMPLATE', template, raising=False)
    else:
        pushed.fault(match, fault, **(dict(status=503) if fault == 'status' else {}))
    what = r'failed \(503\): try again later' if fault == 'status' else "can't be reached|out of reach"
    with pytest.raises(UnavailableError, match=what) as e:
        from_pretrained(REPO)
    assert e.value.__cause__ is not None


@pytest.mark.parametrize('fault', ['drop', 'status', 'truncate'])
def test_a_warm_cache_still_works(pushed, fault):
    model = from_pretrained(REPO)
    pushed.fault('.', fault, **(dict(status=500) if fault == 'status' else {}))
    assert_same(from_pretrained(REPO), model)


def test_a_passing_fault_is_tried_again(pushed):
    pushed.fault('config.json', 'slow', delay=0.3)
    pushed.fault('/storage/', 'drop', times=1)
    if not hasattr(huggingface_hub, 'configure_http_backend'):  # 0.x gives up when an answer breaks off
        pushed.fault('/storage/', 'truncate', times=1)
    from_pretrained(REPO)


@pytest.mark.parametrize('fault', ['flip', 'garbage'])
def test_wrong_bytes_are_refused_and_dropped_from_the_cache(pushed, fault):
    pushed.fault('/storage/', fault, times=1)
    with pytest.raises(CheckpointError, match='dropped from the cache') as e:
        from_pretrained(REPO)
    assert ('SHA-256' if fault == 'flip' else 'not a complete safetensors file') in str(e.value)
    from_pretrained(REPO)


def test_wrong_bytes_in_a_cache_of_others(pushed, monkeypatch):
    pushed.fault('/storage/', 'flip', times=1)
    unlink = Path.unlink

    def refuse(path, **kwargs):
        if path.name == 'model.safetensors':
            raise PermissionError(errno.EACCES, 'Permission denied')
        unlink(path, **kwargs)

    monkeypatch.setattr(Path, 'unlink', refuse)
    with pytest.raises(CheckpointError, match='still in the cache .*Permission denied'):
        from_pretrained(REPO)


@pytest.mark.parametrize('cut, size', [(0, 0), (1, 0), (4, 0), (100, 0), (-1, 0), (None, 2**40), (None, 2**64 - 1)])
def test_truncated_file_and_absurd_header_length_in_the_repository(pushed, cut, size):
    data = pushed.files(REPO)['model.safetensors'][:cut]
    pushed.commit(REPO, {'model.safetensors': struct.pack('<Q', size) + data[8:] if size else data})
    for _ in range(2):
        with pytest.raises(CheckpointError, match='not a complete safetensors file'):
            from_pretrained(REPO)


def test_never_a_pickle(pushed):
    pushed.commit(REPO, {'pytorch_model.bin': b'a pickle'})
    pushed.fault('model.safetensors', 'status', status=403)
    with pytest.raises(AccessError):
        from_pretrained(REPO)
    assert not any('pytorch_model.bin' in request.path and request.method != 'POST' for request in pushed.requests)
    push_to_hub(create(), 'owner/other')
    assert not any(name.endswith('.bin') for name in pushed.files('owner/other'))


def test_config_and_weights_are_of_one_commit(pushed, monkeypatch):
    first = from_pretrained(REPO)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', f'{constants.HF_HUB_CACHE}-2')
    download, names = load.hf_hub_download, []

    def push_in_between(repo_id, filename, **kwargs):
        path = download(repo_id, filename, **kwargs)
        if not names:
            push_to_hub(create(), REPO)
        names.append(filename)
        return path

    monkeypatch.setattr(load, 'hf_hub_download', push_in_between)
    assert torch.equal(from_pretrained(REPO).head.A, first.head.A)
    assert names == ['config.json', 'model.safetensors']


def test_the_token_stays_with_the_hub(pushed):
    pushed.redirect_storage = True
    from_pretrained(REPO)
    elsewhere = [request for request in pushed.requests if request.origin == 'other']
    assert elsewhere and not any('authorization' in request.headers for request in elsewhere)
    assert any('authorization' in request.headers for request in pushed.requests)


def edit(hub, *places, **values):
    """Set the same values in some places of config.json, or remove those that are NOTHING."""
    config = json.loads(hub.files(REPO)['config.json'])
    for part in (config[place] if place else config for place in places):
        part.update(values)
        for key in [key for key in values if values[key] is NOTHING]:
            del part[key]
    hub.commit(REPO, {'config.json': json.dumps(config).encode()})


NOTHING = object()
ARGS, CFG = 'model_args', 'pretrained_cfg'
ONE_NUMBER = 'num_classes: expected one number'
PERCENTILES = dict(score='mahalanobis', quantiles=[0, 1.5, 1.5], head_sha256='0' * 64)
# Where config.json is changed, to what, and what is said
CONFIGS = [
    ([''], dict(architecture='os.system'), 'timm knows no'),
    ([''], dict(architecture='test_vit.zzz_r8'), 'timm knows no'),
    ([''], dict(architecture='test_resnet'), 'img_size|does not describe'),
    ([''], dict(architecture=NOTHING), 'timm knows no None'),
    ([''], dict(num_classes=[5]), ONE_NUMBER),
    ([''], dict(num_classes=5.0), ONE_NUMBER),
    ([''], dict(num_classes=6), ONE_NUMBER),
    ([CFG], dict(num_classes=None), ONE_NUMBER),
    (['', ARGS, CFG], dict(num_classes=10**6 + 1), 'num_classes: expected'),
    ([''], dict(auto_map={}), 'unknown keys auto_map'),
    ([''], dict(model_args=[]), 'model_args: expected an object'),
    ([''], dict(pretrained_cfg=1), 'not a config.json of timm'),
    ([''], dict(label_names='x'), 'label_names: got'),
    (['timm_zzz'], dict(weights_sha256='x'), 'weights_sha256: got'),
    (['timm_zzz'], dict(percentiles=None), 'percentiles: expected an object of score, quantiles, head_sha256'),
    (['timm_zzz'], dict(percentiles=dict(PERCENTILES, x=1)), 'percentiles: expected an object of'),
    (['timm_zzz'], dict(percentiles=dict(PERCENTILES, score='x')), "expected a score of max_logit, .*, got 'x'"),
    (['timm_zzz'], dict(percentiles=dict(PERCENTILES, score=[])), 'expected a score of'),
    (['timm_zzz'], dict(percentiles=dict(PERCENTILES, head_sha256='x')), "SHA-256 of the heads, got 'x'"),
    *(
        (['timm_zzz'], dict(percentiles=dict(PERCENTILES, quantiles=values)), 'expected 2 to 1001 finite quantiles')
        for values in (1, [0], [1, 0], [0, 'x'], [0, True], [0, float('nan')], [0, 10**400], [0] * 1002, [[0], [1]])
    ),
    ([ARGS], dict(features_only=True), 'features_only is not allowed'),
    ([ARGS], dict(device='meta'), 'device is not allowed'),
    ([ARGS], dict(checkpoint_path='/x'), 'checkpoint_path is not allowed'),
    (
        [ARGS],
        dict(pretrained_cfg={}, pretrained_strict=False, cache_dir='/x'),
        'cache_dir, pretrained_cfg, pretrained_str',
    ),
    ([ARGS], dict(scriptable=True, exportable=True, no_jit=True), 'exportable, no_jit, scriptable is not allowed'),
    ([ARGS], dict(depth=10**6), 'depth: expected at most'),
    ([ARGS], dict(embed_dim=10**9), 'embed_dim: expected at most'),
    ([ARGS], dict(embed_dim=[[[[4]]]]), 'embed_dim: got'),
    ([ARGS], dict(depth=[2] * 10**6), 'depth: got'),
    ([ARGS], dict(num_heads=0), 'does not describe a model'),
    ([ARGS], dict(nothing=1), 'does not describe a model'),
    ([ARGS], dict(img_size=10**9), 'img_size: expected at most'),
    ([ARGS], dict(img_size=[1] * 99), 'img_size: got'),
    ([ARGS], dict(act_layer={'a': 1}), 'act_layer: got'),
    ([ARGS], dict(zzz_v_min=float('inf')), 'zzz_v_min: expected at most'),
    ([ARGS], dict(zzz_rank=65), 'rank: expected 0 <= rank <= feat_dim = 64'),
    ([ARGS], dict(zzz_rank=-1), 'zzz_rank: expected an int >= 0'),
    ([ARGS], dict(zzz_init='random'), "init: expected 'flat' or 'reference', got 'random'"),
    ([CFG], dict(url='http://x'), 'url would take the weights'),
    ([CFG], dict(custom_load=True), 'custom_load would take'),
    ([CFG], dict(x=1), 'pretrained_cfg: unknown keys x'),
    ([CFG], dict(input_size=[3, 10**9, 1]), 'input_size: expected three'),
]


@contextmanager
def cheap():
    """Fail what takes more than a second of this process or 256 MiB more than it ever took."""
    seconds, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - seconds < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2**18  # KiB


@pytest.mark.parametrize('places, values, what', CONFIGS)
def test_configs_that_are_refused(pushed, places, values, what):
    edit(pushed, *places, **values)
    with cheap(), pytest.raises(ConfigError, match=what):
        from_pretrained(REPO)


def test_percentiles_of_another_head_are_left_out(pushed):
    edit(pushed, 'timm_zzz', percentiles=PERCENTILES)
    assert percentiles_of(from_pretrained(REPO)) is None


def test_config_without_a_head(pushed):
    edit(pushed, ARGS, zzz_rank=NOTHING)
    edit(pushed, CFG, tag='r160_in1k')
    with pytest.raises(ConfigError, match='no zzz_rank: not a model with a ZZZ head'):
        from_pretrained(REPO)


@pytest.mark.parametrize('text', [b'', b'{', b'[1]', b'\xff', b'[' * 100_000])
def test_configs_that_are_not_json(pushed, text):
    pushed.commit(REPO, {'config.json': text})
    with pytest.raises(ConfigError, match='not a '):
        from_pretrained(REPO)


TOO_LARGE = [('num_classes', 10**6), ('zzz_rank', 64), ('reg_tokens', 9999), ('depth', 9999), ('embed_dim', 9984)]
TOO_LARGE += [('mlp_ratio', 9999.0), ('img_size', 9999), ('patch_size', 1), ('depth', 13)]


@pytest.mark.parametrize('key, value', TOO_LARGE)
def test_configs_that_do_not_fit_the_weights(pushed, key, value):
    """Within the limits, but not what the file holds: refused before memory is taken."""
    edit(pushed, *(['', ARGS, CFG] if key == 'num_classes' else [ARGS]), **{key: value})
    with cheap(), pytest.raises(CheckpointError, match='does not hold the model|values, the model'):
        from_pretrained(REPO)


def rewrite(folder, **values):
    """Set tensors in the weights of a folder."""
    save_file({**load_file(folder / 'model.safetensors'), **values}, folder / 'model.safetensors')


def test_a_folder_whose_weights_were_changed(pushed, tmp_path):
    """Refused, with the way on for its owner; what was downloaded has none, and shapes are checked in any case."""
    save_pretrained(create(), tmp_path)
    bias = torch.arange(5.0)
    rewrite(tmp_path, **{'head.bias': bias})
    with pytest.raises(CheckpointError, match='SHA-256.*changed it yourself, pass check_sha256=False') as e:
        from_pretrained(tmp_path)
    assert 'cache' not in str(e.value) and (tmp_path / 'model.safetensors').exists()
    assert torch.equal(from_pretrained(tmp_path, check_sha256=False).head.bias, bias)
    pushed.commit(REPO, {'model.safetensors': (tmp_path / 'model.safetensors').read_bytes()})
    with pytest.raises(CheckpointError, match='SHA-256.*dropped from the cache') as e:
        from_pretrained(REPO)
    assert 'check_sha256' not in str(e.value)
    with pytest.raises(ValueError, match='check_sha256: .* owner/birds-zzz is not a folder'):
        from_pretrained(REPO, check_sha256=False)
    rewrite(tmp_path, **{'head.bias': torch.zeros(6)})
    with pytest.raises(CheckpointError, match='does not hold the model'):
        from_pretrained(tmp_path, check_sha256=False)


@pytest.mark.parametrize('shape', [(), (1,)])
def test_sigma2_of_either_shape(tmp_path, shape):
    """Files hold it as a scalar or as a vector of one, by the version that wrote them."""
    save_pretrained(create(), tmp_path)
    rewrite(tmp_path, **{'head.sigma2_raw': torch.full(shape, 0.25)})
    assert from_pretrained(tmp_path, check_sha256=False).head.sigma2_raw.item() == 0.25
    rewrite(tmp_path, **{'head.sigma2_raw': torch.full((2,), 0.25)})
    with pytest.raises(CheckpointError, match='sigma2_raw'):
        from_pretrained(tmp_path, check_sha256=False)


# --- failures while pushing -------------------------------------------------------------------------------------------


def test_disk_full(hub, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')

    save_pretrained(create(), tmp_path / 'folder')
    before = (tmp_path / 'folder' / 'config.json').read_bytes()
    monkeypatch.setattr('safetensors.torch.save_file', full)
    with pytest.raises(OSError, match='No space left'):
        push_to_hub(create(), REPO)
    assert not hub.exists(REPO) and not hub.requests
    with pytest.raises(OSError, match='No space left'):
        save_pretrained(create(), tmp_path / 'folder')
    assert (tmp_path / 'folder' / 'config.json').read_bytes() == before
    assert {path.name for path in (tmp_path / 'folder').iterdir()} == {'config.json', 'model.safetensors'}
    from_pretrained(tmp_path / 'folder')


def test_wrong_bytes_on_the_local_disk(hub, monkeypatch):
    write = save_file

    def flip(tensors, path, *args, **kwargs):
        write(tensors, path, *args, **kwargs)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr('safetensors.torch.save_file', flip)
    with pytest.raises(CheckpointError, match='differs from the saved model in'):
        push_to_hub(create(), REPO)
    assert not hub.exists(REPO)


@pytest.mark.parametrize('match', ['/api/repos/create', '/preupload/', '/objects/batch', '/storage/', '/commit/'])
def test_failures_while_pushing(pushed, match):
    for fault in ('drop', 'status', 'garbage')[: 2 if match == '/storage/' else 3]:  # its answer has no content
        pushed.reset()
        pushed.fault(match, fault, **(dict(status=500) if fault == 'status' else {}))
        with pytest.raises(UnavailableError):
            push_to_hub(create(), REPO)
    pushed.reset()
    push_to_hub(create(), REPO)  # and again without
    from_pretrained(REPO)


def test_invalid_card_creates_nothing(hub):
    for card in ('---\nlicense: [1, 2]\n---\n', '---\na: [\n---\n'):
        with pytest.raises(ValueError):
            push_to_hub(create(), REPO, card=card)
    assert not hub.exists(REPO)

"""Trained models of every kind that commands take, against the model that was saved."""

import argparse
import json

import pytest
import timm
import torch
import yaml
from oracles import distinct
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import timm_zzz
from timm_zzz.cli import fit
from timm_zzz.cli.trained import load_trained
from timm_zzz.errors import NotFoundError

CLASSES, SIZE = 3, 32
NAMES = ['ant', 'bee', 'wasp']


def new_model(name):
    return distinct(timm.create_model(name, num_classes=CLASSES)).eval()


@pytest.fixture(scope='module')
def x():
    return torch.randn(2, 3, SIZE, SIZE)


def same(run, model, x):
    with torch.no_grad():
        torch.testing.assert_close(run.model.eval()(x), model(x))


@pytest.mark.parametrize('name', ['test_resnet', 'test_resnet.zzz_r4', 'test_efficientnet'])
def test_checkpoints_of_train_py(name, tmp_path, x):
    model = new_model(name)
    args = dict(model=name, img_size=SIZE, crop_pct=1.0)
    saved = dict(epoch=1, state_dict=model.state_dict(), args=argparse.Namespace(**args), optimizer={})
    torch.save(saved, tmp_path / 'model_best.pth.tar')
    for source in (tmp_path, tmp_path / 'model_best.pth.tar'):
        run = load_trained(str(source))
        same(run, model, x)
        assert run.data_config == dict(img_size=SIZE, crop_pct=1.0) and run.names == []
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model_best.pth.tar')
    with pytest.raises(ValueError, match='--model: neither the checkpoint nor'):
        load_trained(str(tmp_path))
    same(load_trained(str(tmp_path), model_name=name), model, x)
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(args))
    same(load_trained(str(tmp_path)), model, x)


def test_another_architecture_is_an_error(tmp_path):
    state = timm.create_model('test_vit', num_classes=3).state_dict()
    torch.save(dict(state_dict=state, args=argparse.Namespace(model='test_resnet')), tmp_path / 'a.pth.tar')
    with pytest.raises(ValueError, match='the checkpoint has no classifier: was it trained as test_resnet'):
        load_trained(str(tmp_path / 'a.pth.tar'))


def test_a_checkpoint_names_no_other_files(tmp_path, x):
    """Arguments of create_model that open files or addresses have no effect; how images are prepared has."""
    model = new_model('test_resnet.zzz_r4')
    elsewhere = dict(file='/nowhere/x.pth', url='http://127.0.0.1:9/x.pth')
    kwargs = dict(any_head=True, pretrained=True, pretrained_path='/nowhere/y.pth', checkpoint_path='/nowhere/z.pth')
    kwargs.update(pretrained_cfg=elsewhere, pretrained_cfg_overlay=dict(elsewhere, mean=[0.1, 0.2, 0.3]))
    args = argparse.Namespace(model='test_resnet.zzz_r4', model_kwargs=kwargs)
    torch.save(dict(state_dict=model.state_dict(), args=args), tmp_path / 'model_best.pth.tar')
    run = load_trained(str(tmp_path))
    same(run, model, x)
    assert run.model.pretrained_cfg['mean'] == [0.1, 0.2, 0.3] and not run.model.pretrained_cfg.get('file')


def test_folders_of_weights(tmp_path, x):
    zzz, linear = new_model('test_resnet.zzz_r4'), new_model('test_resnet')
    timm_zzz.save_pretrained(zzz, tmp_path / 'zzz', label_names=NAMES)
    config = dict(label_names=NAMES)
    timm.models.save_for_hf(linear, str(tmp_path / 'linear'), model_config=config, safe_serialization=True)
    for name, model in (('zzz', zzz), ('linear', linear)):
        for source in (str(tmp_path / name), f'local-dir:{tmp_path / name}'):
            run = load_trained(source)
            same(run, model, x)
            assert run.names == NAMES
    weights = tmp_path / 'zzz/model.safetensors'
    weights.write_bytes(weights.read_bytes()[:-1] + b'x')
    with pytest.raises(timm_zzz.errors.CheckpointError, match='SHA-256'):
        load_trained(str(tmp_path / 'zzz'))


def test_repositories(tmp_path, x, monkeypatch):
    model = new_model('test_resnet')
    timm.models.save_for_hf(model, str(tmp_path), model_config=dict(label_names=NAMES), safe_serialization=True)
    asked = []

    def download(repo_id, filename, revision=None, **kwargs):
        asked.append((repo_id, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr('timm_zzz.cli.trained.hf_hub_download', download)
    monkeypatch.setattr('timm.models._hub.hf_hub_download', download)
    for source in ('someone/birds@v1', 'hf-hub:someone/birds@v1'):
        run = load_trained(source)
        same(run, model, x)
        assert run.names == NAMES
    assert set(asked) == {('someone/birds', 'v1')}


def test_outputs_of_fit(tmp_path, backbone, x):
    for c, name in enumerate(NAMES):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for i in range(4):
            image = Image.effect_noise((40, 40), 20 * (c + 1) + i).convert('RGB')
            image.save(tmp_path / 'train' / name / f'{i}.png')
    file = tmp_path / 'start.safetensors'
    options = ('--pretrained-path', backbone, '--data-dir', tmp_path, '-j', 0, '--device', 'cpu', '--crop-pct', 1.0)
    model = 'test_resnet.zzz_r4'
    fit.main([str(a) for a in ('--model', model, *options, '--img-size', SIZE, '-o', file)])
    run = load_trained(str(file))
    expected = timm.create_model(model, num_classes=3)
    expected.load_state_dict(load_file(file))
    same(run, expected.eval(), x)
    assert run.names == NAMES and run.data_config == dict(img_size=SIZE, crop_pct=1.0)
    with safe_open(file, 'pt') as opened:
        assert str(tmp_path) not in str(opened.metadata()) and str(backbone) not in str(opened.metadata())
    save_file(load_file(file), file)  # without what fit says about it
    with pytest.raises(ValueError, match='start.safetensors does not name the model'):
        load_trained(str(file))
    same(load_trained(str(file), model_name=model), expected, x)
    save_file(load_file(file), file, dict(model=model, args=json.dumps(dict(img_size='x'))))
    with pytest.raises(ValueError, match='img_size: not a value that train.py takes'):
        load_trained(str(file))
    file.write_bytes(b'nothing')
    with pytest.raises(ValueError, match="can't be read as an output of fit"):
        load_trained(str(file))


def test_what_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'output').mkdir()
    for path in ('output/mine', './output', '../nothing/here', str(tmp_path / 'x/y')):  # none of them a repository
        with pytest.raises(ValueError, match='no such file or folder|no such checkpoint'):
            load_trained(path)
    with pytest.raises(ValueError, match='no such file or folder; expected a checkpoint or run of train.py'):
        load_trained(str(tmp_path / 'a/b/c.pth.tar'))
    with pytest.raises(ValueError, match='no such checkpoint'):
        load_trained(str(tmp_path))
    with pytest.raises((NotFoundError, timm_zzz.errors.HubError)):
        load_trained('nobody/nothing')

"""``python -m timm_zzz demo``, with a few images."""

import json

import pytest
import torch

from timm_zzz.cli import demo

ARGUMENTS = ['--epochs', '1', '--images', '6', '--workers', '1', '--device', 'cpu']


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(demo, 'VALIDATION_IMAGES', 2)


def test_demo(few_images, tmp_path, capsys):
    output = tmp_path / 'new' / 'out'
    demo.main([*ARGUMENTS, '--output', str(output)])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert rows[1] == ['model', 'top-1', '%', 'NLL', 'seconds']
    assert [row[0] for row in rows[2:4]] == ['test_resnet', 'test_resnet.zzz_r8']
    assert all(0 <= float(row[1]) <= 100 and float(row[2]) > 0 for row in rows[2:4])
    assert f"timm.create_model('local-dir:{output}/model', pretrained=True): same logits" in out
    assert {path.name for path in output.iterdir()} == {'model', 'confusions.png', 'validation'}
    assert [path.name for path in output.parent.iterdir()] == ['out']
    assert (output / 'confusions.png').stat().st_size > 1000 and (output / 'model/model.safetensors').is_file()
    assert len([*output.glob('validation/*/*.png')]) == 24
    config = json.loads((output / 'model/config.json').read_text())
    assert config['model_args']['zzz_rank'] == 8 and config['pretrained_cfg']['input_size'] == [3, 64, 64]
    assert config['label_names'] == sorted(path.name for path in (output / 'validation').iterdir())
    for arguments, message in (['--output', output], 'exists already'), (['--device', 'nowhere'], 'is not available'):
        with pytest.raises(SystemExit) as error:
            demo.main([*ARGUMENTS, *map(str, arguments)])
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_interrupted_demo_leaves_nothing(few_images, monkeypatch, tmp_path, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, 'train', lambda *args: torch.nn.Identity())
    monkeypatch.setattr(demo, 'validation_loader', lambda *args: [])
    monkeypatch.setattr(demo, 'evaluate', lambda *args: None)
    monkeypatch.setattr(demo, 'save_pretrained', interrupt)
    with pytest.raises(SystemExit) as error:
        demo.main([*ARGUMENTS, '--output', str(tmp_path / 'out')])
    assert error.value.code == 130 and 'nothing was saved' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

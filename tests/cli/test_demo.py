"""``python -m timm_zzz demo``, with a few images."""

import json

import pytest
import torch
from sklearn.metrics import roc_auc_score

from timm_zzz.cli import demo

ARGUMENTS = ['--epochs', '1', '--images', '2', '--repeats', '1', '--device', 'cpu', '--workers']


@pytest.fixture
def few_images(monkeypatch):
    for name, value in (('COARSE_IMAGES', 4), ('COARSE_EPOCHS', 1), ('TEST_IMAGES', 2)):
        monkeypatch.setattr(demo, name, value)


def test_classes_are_finer_ones_and_an_unknown_one():
    assert sorted(kind for kinds in demo.COARSE.values() for kind in kinds) == sorted(
        kinds[0] for kinds in demo.FINE.values()
    )
    assert [len(kinds) for kinds in demo.COARSE.values()] == [2] * 6 and len(demo.FINE) == 12
    assert not {kind[1] for kinds in demo.UNKNOWN.values() for kind in kinds} & {*demo.WINGS}


def test_auroc():
    inliers, outliers = torch.tensor([0.0, 1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0])
    expected = 100 * roc_auc_score([0] * 4 + [1] * 3, torch.cat([inliers, outliers]))
    assert demo.auroc(inliers, outliers) == pytest.approx(expected)


@pytest.mark.parametrize('rank', [None, 4])
def test_models_start_on_the_trained_backbone(rank, tmp_path):
    trained = demo.timm.create_model('test_resnet', num_classes=len(demo.COARSE))
    torch.save(trained.state_dict(), tmp_path / 'backbone.pth')
    x, y = torch.randn(24, 3, 64, 64), torch.arange(24) % 12
    model = demo.create_model(rank, tmp_path / 'backbone.pth', zzz_fit=[(x, y)]).eval()
    assert torch.equal(model.forward_features(x), trained.eval().forward_features(x))
    logits = model(x)
    if rank is None:
        assert torch.equal(logits, logits[:1].expand(24, -1))  # the bias alone
    else:
        assert model.get_classifier().rank == rank
        assert (logits.argmax(1) == y).double().mean() > 0.5


def test_demo(few_images, tmp_path, capsys):
    output, threads = tmp_path / 'new' / 'out', torch.get_num_threads()
    demo.main([*ARGUMENTS, '0', '--output', str(output)])
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    head, *rows = [line.split('  ') for line in out.splitlines()[2:7]]
    assert [part.strip() for part in head if part] == ['top-1 %', 'NLL', 'AUROC %', 'seconds', 'score of the AUROC']
    rows = [[part.strip() for part in row if part] for row in rows]
    assert [row[0] for row in rows] == [*demo.METHODS]
    assert all(0 <= float(row[1]) <= 100 and float(row[2]) > 0 and 0 <= float(row[3]) <= 100 for row in rows)
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
            demo.main([*ARGUMENTS, '1', *map(str, arguments)])
        assert error.value.code == 2 and message in capsys.readouterr().err


def test_interrupted_demo_leaves_nothing(few_images, monkeypatch, tmp_path, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, 'train', lambda *args: None)
    monkeypatch.setattr(demo, 'save_pretrained', interrupt)
    with pytest.raises(SystemExit) as error:
        demo.main([*ARGUMENTS, '0', '--output', str(tmp_path / 'out')])
    assert error.value.code == 130 and 'nothing was saved' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

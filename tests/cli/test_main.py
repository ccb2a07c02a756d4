import json

import pytest
import torch
import yaml

import timm_zzz
from timm_zzz.__main__ import _COMMANDS, data_files


def test_help_names_every_command_with_an_example(run):
    out = run('-m', 'timm_zzz', '--help').stdout
    assert 'torchrun' in out and all(f'python -m timm_zzz {command} ' in out for command in _COMMANDS)
    assert run('-m', 'timm_zzz', check=False).returncode == 2
    assert timm_zzz.__version__ in run('-m', 'timm_zzz', '--version').stdout


@pytest.mark.parametrize(
    'argument, message', [('nope.py', 'no such script'), ('.', 'is a directory'), ('--x', 'unknown')]
)
def test_wrong_script_is_one_line_and_status_2(run, argument, message):
    result = run('-m', 'timm_zzz', argument, check=False)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1


_SCRIPT = """
import json, sys, timm
assert 'timm_zzz' in sys.modules and __name__ == '__main__'
import beside
timm.create_model('test_vit.zzz_r8', num_classes=2)
print(json.dumps([sys.argv, sys.path[0], __file__, sys.modules['__main__'].__file__]))
sys.exit(3)
"""


def test_script_runs_as_if_called_directly(run, tmp_path):
    folder = tmp_path / 'scripts'
    folder.mkdir()
    (folder / 'beside.py').touch()
    (folder / 'job.py').write_text(_SCRIPT)
    result = run('-m', 'timm_zzz', 'scripts/job.py', '--flag', 'a b', check=False)
    assert result.returncode == 3, result.stderr
    argv, path, file, main = json.loads(result.stdout)
    assert argv == ['scripts/job.py', '--flag', 'a b'] and path == str(folder.resolve())
    assert file == main == 'scripts/job.py'


def test_torchrun(run, tmp_path):
    (tmp_path / 'job.py').write_text(
        'import os, pathlib, timm, torch.distributed as dist\n'
        'dist.init_process_group("gloo")\n'
        'timm.create_model("test_vit.zzz_r8", num_classes=2)\n'
        'pathlib.Path(os.environ["RANK"] + ".txt").write_text(str(dist.get_world_size()))\n'
        'dist.destroy_process_group()\n'
    )
    run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, '-m', 'timm_zzz', 'job.py')
    assert [(tmp_path / f'{r}.txt').read_text() for r in (0, 1)] == ['2', '2']


def test_hparams(run):
    names = run('-m', 'timm_zzz', 'hparams').stdout.split()
    assert 'quickstart_mobilenetv2_100.zzz_r8' in names and 'cub200_vit_base_patch16_224' in names
    for name in ('quickstart_mobilenetv2_100.zzz_r8', 'cub200_vit_base_patch16_224.yaml'):
        path = run('-m', 'timm_zzz', 'hparams', name).stdout.strip()
        with open(path) as f:
            assert yaml.safe_load(f)['model'] in (name.split('_', 1)[1], 'vit_base_patch16_224.augreg_in21k')
    result = run('-m', 'timm_zzz', 'hparams', 'nope', check=False)
    assert result.returncode == 2 and 'no recipe named nope' in result.stderr


def test_data_files_travel_with_the_package():
    assert data_files('hparams', '.yaml') and data_files('hub_cards', '.md')


def test_demo(run, tmp_path):
    arguments = ['-m', 'timm_zzz', 'demo', '--epochs', 1, '--images', 6, '--workers', 1, '--device', 'cpu']
    out = run(*arguments, '--output', 'out').stdout
    assert 'test_resnet.zzz_r8' in out and 'same logits' in out
    assert (tmp_path / 'out/confusions.png').stat().st_size > 1000
    assert (tmp_path / 'out/model/model.safetensors').is_file()
    config = json.loads((tmp_path / 'out/model/config.json').read_text())
    assert config['model_args']['zzz_rank'] == 8 and len(config['label_names']) == 12
    again = run(*arguments, '--output', 'out', check=False)
    assert again.returncode == 2 and 'exists already' in again.stderr


def test_interrupted_demo_leaves_nothing(monkeypatch, tmp_path, capsys):
    from timm_zzz.cli import demo

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, 'draw_confusions', interrupt)
    monkeypatch.setattr(
        demo, 'train', lambda *a: (torch.nn.Identity(), demo.Result(0, 0, 0, torch.zeros(1), torch.zeros(1)))
    )
    monkeypatch.setattr(demo, 'save_for_hf', lambda model, folder, **k: None)
    with pytest.raises(SystemExit) as error:
        demo.main(['--output', str(tmp_path / 'out'), '--images', '1', '--device', 'cpu'])
    assert error.value.code == 130 and 'nothing was saved' in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

"""README.md's commands by timm's train.py, on tiny images."""

import csv
import json
from pathlib import Path

import pytest
import timm
import train_script
from safetensors.torch import save_file


def test_runs_and_rows(timm_scripts, beetles, tmp_path):
    file, results = tmp_path / 'weights.safetensors', tmp_path / 'rows.jsonl'
    state = timm.create_model('mobilenetv2_100').state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith('classifier.')}, file)
    options = ['--scripts', timm_scripts, '--data-dir', beetles, '--num-classes', 12, '--results', results]
    options += ['--pretrained-path', file, '--seeds', 1, '--device', 'cpu', '--img-size', 32, '--workers', 0]
    options = [str(option) for option in (*options, '--epochs', 1, '--warmup-epochs', 0)]
    train_script.main([*options, '--heads', 'linear:rows=zero', 'zzz_r8:fit=finetune'])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row['head'] for row in rows] == ['linear:rows=zero', 'zzz_r8:fit=finetune']
    assert all(row['epoch'] == 0 and 0 <= row['top1'] <= 100 and row['nll'] > 0 for row in rows)
    assert str(tmp_path) not in results.read_text()
    before = results.read_text()
    train_script.main([*options, '--heads', 'linear:rows=zero'])  # what is there is not run again
    assert results.read_text() == before
    with pytest.raises(SystemExit, match='1 runs failed, the first with'):
        train_script.main([*options, '--heads', 'zzz_r8', '--no-such-option'])


def test_figures_are_of_the_last_epoch(monkeypatch, tmp_path):
    def finished(command, cwd, **kwargs):
        folder = cwd / command[command.index('--experiment') + 1]
        folder.mkdir()
        with (folder / 'summary.csv').open('w') as f:
            writer = csv.writer(f)
            writer.writerows([('epoch', 'eval_loss', 'eval_top1'), (0, 0.5, 90.0), (1, 0.7, 80.0)])
        commands.append(command)
        return type('Done', (), {'returncode': 0})

    commands, results = [], tmp_path / 'rows.jsonl'
    (tmp_path / 'train.py').touch()
    monkeypatch.setattr(train_script.subprocess, 'run', finished)
    fixed = ['--scripts', tmp_path, '--data-dir', tmp_path, '--num-classes', 3, '--results', results, '--seeds', 5]
    fixed += ['--pretrained-path', 'weights.safetensors', '--epochs', 2]
    train_script.main([str(option) for option in fixed])
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row['top1'], row['nll'], row['epoch']) for row in rows] == [(80.0, 0.7, 1)] * 4
    assert [row['options'] for row in rows] == ['--epochs 2'] * 4  # not where the weights lie
    zero = commands[1]
    assert zero[-6:] == ['--model', 'mobilenetv2_100', '--head-init-scale', '0.0', '--epochs', '2']
    assert f'zzz_fit={tmp_path}/train' in commands[3]
    assert str(Path('weights.safetensors').resolve()) in zero  # train.py runs in another folder

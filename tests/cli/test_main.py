"""``python -m timm_zzz``: the table of commands in this process, and scripts of others in processes of their own."""

import argparse
import io
import json
import re
import sys

import pytest
import yaml
from tqdm import tqdm

import timm_zzz
from timm_zzz.__main__ import COMMANDS, main
from timm_zzz.cli.common import exit_on_error, warn
from timm_zzz.data import shipped_files


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line; returns its exit status, output and errors."""

    def _call(*arguments):
        monkeypatch.setattr(sys, 'argv', ['python -m timm_zzz', *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as e:
            status = e.code or 0
        return (status, *capsys.readouterr())

    return _call


def test_help_names_every_command_with_an_example(call):
    status, out, _ = call('--help')
    assert not status and 'torchrun' in out and all(f'python -m timm_zzz {command} ' in out for command in COMMANDS)
    assert call() == (2, '', out)
    assert timm_zzz.__version__ in call('--version')[1]


@pytest.mark.parametrize('command', COMMANDS)
def test_commands_have_help(call, command):
    status, out, _ = call(command, '--help')
    assert not status and out.startswith(f'usage: python -m timm_zzz {command} ')


@pytest.mark.parametrize(
    'argument, message', [('nope.py', 'no such script'), ('.', 'is a directory'), ('--x', 'unknown')]
)
def test_wrong_script_is_one_line_and_status_2(call, argument, message):
    status, _, err = call(argument)
    assert status == 2 and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    'name, right', [('reprot', 'report'), ('demoo', 'demo'), ('check_hparams', 'check-hparams'), ('fit.py', 'fit')]
)
def test_misspelt_command(call, name, right):
    assert call(name)[2].startswith(f'timm_zzz: error: no such script or command: {name}; did you mean {right}? (see ')


@pytest.mark.parametrize(
    'name, option, right',
    [
        ('resent50.zzz_r8', '--model {}', 'resnet50.zzz_r8'),
        ('resnet50_zzz_r8', '--model={}', 'resnet50.zzz_r8'),
        ('resent50.zzz_r8', '--config a.yaml', 'resnet50'),  # timm's error has the architecture alone
    ],
)
def test_script_with_a_misspelt_model(call, tmp_path, monkeypatch, name, option, right):
    monkeypatch.setattr(sys, 'path', [*sys.path])
    script, arguments = tmp_path / 'reprot', option.format(name).split()
    script.write_text(f'import timm\ntimm.create_model({name!r})\n')
    with pytest.raises(RuntimeError, match=rf'^Unknown model \(.*\); did you mean {right}\?$'):
        call(script, *arguments)


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def lines(self):
        """List the lines that a terminal shows in the end."""
        for line in self.getvalue().split('\n'):
            shown = ''
            for text in line.split('\r'):
                shown = text + shown[len(text) :]
            yield shown.rstrip()


@pytest.mark.parametrize(
    'stream, variables, color',
    [
        (Terminal(), {}, True),
        (Terminal(), {'NO_COLOR': ''}, True),
        (Terminal(), {'NO_COLOR': '1'}, False),
        (Terminal(), {'TERM': 'dumb'}, False),
        (io.StringIO(), {}, False),
    ],
)
def test_color(stream, variables, color, monkeypatch):
    for name, value in {'NO_COLOR': '', 'TERM': 'xterm', **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, 'stderr', stream)
    warn('a')
    with pytest.raises(SystemExit) as e, exit_on_error(argparse.ArgumentParser()):
        raise ValueError('b\nc')
    assert e.value.code == 2
    text = re.sub(r'\033\[[\d;]*m', '', stream.getvalue())
    assert text == 'timm_zzz: warning: a\ntimm_zzz: error: b c\n' and (text != stream.getvalue()) == color


def test_messages_stand_apart_from_progress_bars(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, 'stderr', stream)
    monkeypatch.setenv('NO_COLOR', '1')
    with tqdm([1, 2], desc='images', file=stream, ncols=60, mininterval=0) as batches, pytest.raises(SystemExit):
        for _ in batches:
            warn('first')
            with exit_on_error(argparse.ArgumentParser()):
                raise ValueError('last')
    lines = [*stream.lines()]
    assert lines[:2] == ['timm_zzz: warning: first', 'timm_zzz: error: last'] and lines[2].startswith('images:   0%')


def test_hparams(call):
    out = call('hparams')[1]
    names = out.split()
    assert out.startswith('quickstart') and 'Start with quickstart_mobilenetv2_100.zzz_r8.' in out
    assert re.search(r'^cub200_resnet50 +CUB-200-2011, ResNet-50 .*: timm\'s linear head\.$', out, re.M)
    assert 'quickstart_mobilenetv2_100.zzz_r8' in names and 'cub200_vit_base_patch16_224' in names
    for name in ('quickstart_mobilenetv2_100.zzz_r8', 'cub200_vit_base_patch16_224.yaml'):
        with open(call('hparams', name)[1].strip()) as file:
            assert yaml.safe_load(file)['model'] in (name.split('_', 1)[1], 'vit_base_patch16_224.augreg_in21k')
    status, _, err = call('hparams', 'nope')
    assert status == 2 and 'no recipe named nope' in err


def test_data_files_travel_with_the_package():
    assert shipped_files('hparams', '.yaml') and shipped_files('hub_cards', '.md')


# Runs at the start of the process, before timm_zzz: notes what timm alone loads.
_SITE = """
import runpy, sys
runpy.run_path({guard!r})
import timm
sys.loaded_by_timm = {{*sys.modules}}
"""

_SCRIPT = """
import json, sys, timm
assert 'timm_zzz' in sys.modules and __name__ == '__main__'
import beside
timm.create_model('test_vit.zzz_r8', num_classes=2)
facts = [sys.argv, sys.path[0], __file__, sys.modules['__main__'].__file__]

from timm_zzz.__main__ import main
for command in '--help', 'hparams':
    sys.argv = ['', command]
    try:
        main()
    except SystemExit as e:
        assert not e.code
print(json.dumps([*facts, sorted({*sys.modules} - sys.loaded_by_timm)]))
sys.exit(3)
"""


def test_script_runs_as_if_called_directly_and_little_is_loaded(run, root, tmp_path, monkeypatch):
    for folder in ('scripts', 'site'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'site/sitecustomize.py').write_text(_SITE.format(guard=str(root / 'tests/guard/sitecustomize.py')))
    (tmp_path / 'scripts/beside.py').touch()
    (tmp_path / 'scripts/job.py').write_text(_SCRIPT)
    monkeypatch.setenv('PYTHONPATH', str(tmp_path / 'site'), prepend=':')
    result = run('-m', 'timm_zzz', 'scripts/job.py', '--flag', 'a b', check=False)
    assert result.returncode == 3, result.stderr
    argv, path, file, main_file, loaded = json.loads(result.stdout.splitlines()[-1])
    assert argv == ['scripts/job.py', '--flag', 'a b'] and path == str((tmp_path / 'scripts').resolve())
    assert file == main_file == 'scripts/job.py'
    assert {name for name in loaded if name.startswith('timm_zzz.cli')} == {'timm_zzz.cli', 'timm_zzz.cli.hparams'}
    assert not {'matplotlib', 'jinja2', 'sklearn', 'triton', 'onnx'} & {name.partition('.')[0] for name in loaded}


def test_torchrun(run, tmp_path):
    (tmp_path / 'job.py').write_text(
        'import os, pathlib, timm, torch.distributed as dist\n'
        'dist.init_process_group("gloo")\n'
        'timm.create_model("test_vit.zzz_r8", num_classes=2)\n'
        'pathlib.Path(os.environ["RANK"] + ".txt").write_text(str(dist.get_world_size()))\n'
        'dist.destroy_process_group()\n'
    )
    run('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 1, '-m', 'timm_zzz', 'job.py')
    assert (tmp_path / '0.txt').read_text() == '1'

"""A Hub on this machine for tests: HTTP as the unmodified huggingface_hub client speaks it, with faults on demand.

It knows what the tests of this package ask for and no more. *.safetensors goes through LFS (or Xet), everything else
through the commit itself.
"""

import base64
import hashlib
import json
import re
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LICENSES = ('apache-2.0', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc0-1.0', 'gpl-3.0', 'mit', 'other', 'unknown')


class Request(NamedTuple):
    """A request as it came in; the path is without query and unquoted: 'refs/pr/1', not 'refs%2Fpr%2F1'."""

    method: str
    path: str
    query: str
    headers: Dict[str, str]
    origin: str


class _Entry(NamedTuple):
    """A file of a commit; its content is known under the oid: SHA-256 for LFS, else the SHA-1 of the git blob."""

    oid: str
    size: int
    lfs: bool
    xet: Optional[str] = None


@dataclass
class _Repo:
    id: str
    private: bool = False
    gated: bool = False
    disabled: bool = False
    commits: Dict[str, Dict[str, _Entry]] = field(default_factory=dict)
    refs: Dict[str, str] = field(default_factory=dict)  # branches, tags and pull requests

    @property
    def owner(self) -> str:
        return self.id.split('/')[0]

    @property
    def main(self) -> Dict[str, _Entry]:
        return self.commits[self.refs['main']]

    def add(self, files: Dict[str, _Entry]) -> str:
        """Add a commit, which no reference points to yet."""
        oid = hashlib.sha1(repr((self.id, len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[oid] = files
        return oid


class _Answer(Exception):
    """Hold a response; it is an exception, so that any check can end the request with it."""

    def __init__(self, status: int = 200, body: Any = b'', **headers: Any):
        self.status = status
        self.headers = {name.replace('_', '-'): str(value) for name, value in headers.items()}
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            self.headers.setdefault('Content-Type', 'application/json; charset=utf-8')
        self.body: bytes = body
        self.cut: Optional[int] = None  # close after as many bytes of the body


def _refuse(status: int, message: str, code: Optional[str] = None, **headers: Any) -> _Answer:
    if code:
        headers['X_Error_Code'] = code
    return _Answer(status, {'error': message}, X_Error_Message=message, **headers)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: 'HubServer', origin: str):
        self.hub, self.origin = hub, origin
        super().__init__(('127.0.0.1', 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _serve(self) -> None:
        # Always all of it, so that a connection closed early reads the same to every client
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(url.path), url.query, headers, self.server.origin)
        answer = self.server.hub._answer(request, url.path, body)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in {'Content-Length': str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(answer.body[: answer.cut])
        if answer.cut is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = _serve


class HubServer:
    """The Hub. Its users are in ``tokens`` (token to name); only a namespace's owner creates or writes there."""

    tokens = {'hf_owner': 'owner', 'hf_guest': 'guest'}

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.reset()
        self.endpoint = f'http://127.0.0.1:{_Listener(self, "main").server_port}'
        self.other_origin = f'http://localhost:{_Listener(self, "other").server_port}'

    def reset(self) -> None:
        """Forget repositories, faults and requests, and set the options back."""
        with self._lock:
            self.redirect_storage = False  # LFS files come from other_origin
            self.xet_dir: Optional[Path] = None  # Xet's chunks are kept there, by the client itself
            self.requests: List[Request] = []
            self._faults: List[Dict[str, Any]] = []
            self._repos: Dict[str, _Repo] = {}
            self._blobs: Dict[str, bytes] = {}

    def add_repo(self, repo_id: str, files: Mapping[str, bytes], **limits: bool) -> None:
        """Add a repository, whoever owns it, that may be private, gated or disabled."""
        with self._lock:
            repo = self._repos[repo_id] = _Repo(repo_id, **limits)
            repo.refs['main'] = repo.add(self._store(files))

    def commit(self, repo_id: str, files: Mapping[str, bytes], delete: Iterable[str] = ()) -> None:
        """Add a commit to the default branch."""
        with self._lock:
            repo = self._repos[repo_id]
            kept = {name: entry for name, entry in repo.main.items() if name not in set(delete)}
            repo.refs['main'] = repo.add({**kept, **self._store(files)})

    def files(self, repo_id: str) -> Dict[str, bytes]:
        """Names and contents in the default branch."""
        with self._lock:
            return {name: self._blobs[entry.oid] for name, entry in self._repos[repo_id].main.items()}

    def exists(self, repo_id: str) -> bool:
        return repo_id in self._repos

    def fault(self, match: str, action: str, times: float = float('inf'), **options: Any) -> None:
        """Let the next ``times`` requests whose path matches the regular expression go wrong.

        ``action`` is 'drop' (no answer), 'status' (status, message), 'slow' (delay in seconds), or with a successful
        answer that has a body 'truncate' (half of it), 'flip' (a byte near its end) or 'garbage' (as many other bytes).
        Of several matching faults the one that was set first applies until it is used up.
        """
        assert action in ('drop', 'truncate', 'flip', 'garbage', 'status', 'slow'), action
        with self._lock:
            self._faults.append(dict(match=match, action=action, left=times, **options))

    def _answer(self, request: Request, raw_path: str, body: bytes) -> Optional[_Answer]:
        with self._lock:
            self.requests.append(request)
            fault = self._take_fault(request, ('drop', 'status', 'slow'))
        action = fault.get('action')
        if action == 'drop':
            return None
        if action == 'slow':  # not time.sleep, which tests take from the client
            threading.Event().wait(fault['delay'])
        if action == 'status':
            return _refuse(fault['status'], fault.get('message', 'a fault was asked for'))
        with self._lock:
            try:
                answer = self._route(request, raw_path, body)
            except _Answer as e:
                answer = e
            except Exception as e:
                answer = _refuse(500, f'{type(e).__name__}: {e}')
            if answer.body and answer.status == 200 and request.method != 'HEAD':
                fault, size = self._take_fault(request, ('truncate', 'flip', 'garbage')), len(answer.body)
                if fault.get('action') == 'truncate':
                    answer.cut = size // 2
                elif fault:  # of all bytes, or of one near the end
                    wrong = range(size) if fault['action'] == 'garbage' else [size - 1 - min(8, size // 2)]
                    answer.body = bytes(byte ^ 0x5A if i in wrong else byte for i, byte in enumerate(answer.body))
        return answer

    def _take_fault(self, request: Request, actions: Tuple[str, ...]) -> Dict[str, Any]:
        for fault in self._faults:
            if fault['action'] in actions and fault['left'] > 0 and re.search(fault['match'], request.path):
                fault['left'] -= 1
                return fault
        return {}

    def _route(self, request: Request, raw_path: str, body: bytes) -> _Answer:
        for pattern, method, name in _ROUTES:
            if method == request.method or (method, request.method) == ('GET', 'HEAD'):
                found = re.fullmatch(pattern, raw_path)
                if found and (request.origin == 'main' or name == 'storage'):
                    parts = {key: unquote(value) for key, value in found.groupdict().items()}
                    return getattr(self, f'_on_{name}')(request, body, **parts)
        return _refuse(404, 'no such page')

    def _user(self, request: Request) -> Optional[str]:
        token = request.headers.get('authorization', '').removeprefix('Bearer ')
        if token and token not in self.tokens:
            raise _refuse(401, 'Invalid credentials in Authorization header')
        return self.tokens.get(token)

    def _find(self, request: Request, repo_id: str, revision: str = 'main', write: bool = False) -> Tuple[_Repo, str]:
        """The repository and commit if the request may see it or, with ``write``, change or propose to change it."""
        user = self._user(request)
        repo = self._repos.get(repo_id)
        if repo is None or repo.private and user != repo.owner:
            # the real Hub says 401 to the anonymous, which the client takes for this only over https
            raise _refuse(404, 'Repository not found', 'RepoNotFound')
        if repo.disabled:
            raise _refuse(403, 'Access to this resource is disabled.')
        if write and user != repo.owner and not (user and 'create_pr=1' in request.query):
            raise _refuse(403, f'You do not have the right to write to {repo_id}')
        oid = repo.refs.get(revision, revision)
        if oid not in repo.commits:
            raise _refuse(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repo, oid

    def _store(self, files: Mapping[str, bytes]) -> Dict[str, _Entry]:
        entries = {}
        for name, data in files.items():
            lfs = name.endswith('.safetensors')
            git = hashlib.sha1(b'blob %d\0' % len(data) + data)
            oid = (hashlib.sha256(data) if lfs else git).hexdigest()
            self._blobs[oid] = data
            entries[name] = _Entry(oid, len(data), lfs)
        return entries

    def _find_object(self, oid: str) -> _Entry:
        if oid in self._blobs:
            return _Entry(oid, len(self._blobs[oid]), True)
        for path in self.xet_dir.rglob('shards/*.mdb') if self.xet_dir else ():
            for xet, size, sha256 in _read_shard(path.read_bytes()):
                if sha256 == oid:
                    return _Entry(oid, size, True, xet)
        raise _refuse(404, f'LFS object {oid} has not been uploaded')

    def _on_info(self, request: Request, body: bytes, repo: str, revision: str = 'main') -> _Answer:
        found, oid = self._find(request, repo, revision)
        siblings = [{'rfilename': name} for name in sorted(found.commits[oid])]
        about = dict(id=repo, sha=oid, siblings=siblings, private=found.private, disabled=found.disabled, tags=[])
        return _Answer(200, about)

    def _on_resolve(self, request: Request, body: bytes, repo: str, revision: str, name: str) -> _Answer:
        found, oid = self._find(request, repo, revision)
        if found.gated and self._user(request) != found.owner:
            return _refuse(403, f'Access to model {repo} is restricted', 'GatedRepo')
        entry = found.commits[oid].get(name)
        if entry is None:
            return _refuse(404, 'Entry not found', 'EntryNotFound', X_Repo_Commit=oid)
        about = dict(X_Repo_Commit=oid, X_Linked_Etag=f'"{entry.oid}"', X_Linked_Size=entry.size)
        if entry.xet:
            token = f'{self.endpoint}/api/models/{repo}/xet-read-token/{oid}'
            about.update(X_Xet_Hash=entry.xet, Link=f'<{token}>; rel="xet-auth"')
        # The client follows a HEAD's redirect within one origin, where the headers above would be lost: the real
        # Hub's storage is always elsewhere.
        if entry.lfs and (request.method == 'GET' or self.redirect_storage):
            origin = self.other_origin if self.redirect_storage else self.endpoint
            return _Answer(302, Location=f'{origin}/storage/{entry.oid}', **about)
        if request.method == 'HEAD':
            return _Answer(200, ETag=f'"{entry.oid}"', Content_Length=entry.size, **about)
        return _Answer(200, self._blobs[entry.oid], ETag=f'"{entry.oid}"', **about)

    def _on_storage(self, request: Request, body: bytes, oid: str) -> _Answer:
        return _Answer(200, self._blobs[oid], ETag=f'"{oid}"', Content_Type='application/octet-stream')

    def _on_create(self, request: Request, body: bytes) -> _Answer:
        user, options = self._user(request), json.loads(body)
        repo_id = f'{options.get("organization") or user}/{options["name"]}'
        if user is None or repo_id.split('/')[0] != user:
            return _refuse(403, f"You don't have the rights to create a model under the namespace {repo_id}")
        url = {'url': f'{self.endpoint}/{repo_id}'}
        if repo_id in self._repos:
            return _Answer(409, {'error': 'You already created this model repo', **url})
        private = bool(options.get('private')) or options.get('visibility') == 'private'
        self.add_repo(repo_id, {'.gitattributes': b'*.safetensors filter=lfs -text\n'}, private=private)
        return _Answer(200, url)

    def _on_validate(self, request: Request, body: bytes) -> _Answer:
        is_json = request.headers['content-type'].startswith('application/json')  # from huggingface_hub 1.0 on
        errors = _card_errors(json.loads(body)['content'] if is_json else parse_qs(body.decode())['content'][0])
        answer = {'errors': [{'message': error} for error in errors], 'warnings': []}
        return _Answer(400, {'error': '; '.join(errors), **answer}) if errors else _Answer(200, answer)

    def _on_preupload(self, request: Request, body: bytes, repo: str, revision: str) -> _Answer:
        found, oid = self._find(request, repo, revision, write=True)
        files = []
        for path in (file['path'] for file in json.loads(body)['files']):
            mode = 'lfs' if path.endswith('.safetensors') else 'regular'
            files.append({'path': path, 'uploadMode': mode, 'shouldIgnore': False})
            if path in found.commits[oid]:
                files[-1]['oid'] = found.commits[oid][path].oid
        return _Answer(200, {'files': files})

    def _on_batch(self, request: Request, body: bytes, repo: str) -> _Answer:
        batch = json.loads(body)
        self._find(request, repo, write='ref' in batch)  # a pull request's objects come without
        objects: List[Dict[str, Any]] = []
        for wanted in batch['objects']:
            objects.append({'oid': wanted['oid'], 'size': wanted['size']})
            if wanted['oid'] not in self._blobs:
                objects[-1]['actions'] = {'upload': {'href': f'{self.endpoint}/storage/{wanted["oid"]}'}}
        transfer = 'xet' if self.xet_dir and 'xet' in batch.get('transfers', ()) else 'basic'
        return _Answer(200, {'transfer': transfer, 'objects': objects}, Content_Type='application/vnd.git-lfs+json')

    def _on_upload(self, request: Request, body: bytes, oid: str) -> _Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return _refuse(400, 'the content does not have this SHA-256')
        self._blobs[oid] = body
        return _Answer(200, ETag=f'"{oid}"')

    def _on_commit(self, request: Request, body: bytes, repo: str, revision: str) -> _Answer:
        found, parent = self._find(request, repo, revision, write=True)
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        files = dict(found.commits[parent])
        for key, value in ((line['key'], line['value']) for line in lines):
            if key == 'file':
                files.update(self._store({value['path']: base64.b64decode(value['content'], validate=True)}))
            elif key == 'lfsFile':
                files[value['path']] = self._find_object(value['oid'])
        oid = found.add(files)
        answer = {'success': True, 'commitOid': oid, 'commitUrl': f'{self.endpoint}/{repo}/commit/{oid}'}
        if 'create_pr=1' in request.query:
            number = 1 + sum(name.startswith('refs/pr/') for name in found.refs)
            answer['pullRequestUrl'] = f'{self.endpoint}/{repo}/discussions/{number}'
            revision = f'refs/pr/{number}'
        found.refs[revision] = oid
        return _Answer(200, answer)

    def _on_ref(self, request: Request, body: bytes, repo: str, kind: str, name: str) -> _Answer:
        found, oid = self._find(request, repo, name if kind == 'tag' else 'main', write=True)
        found.refs[json.loads(body).get('tag', name)] = oid
        return _Answer(200, {})

    def _on_xet(self, request: Request, body: bytes, repo: str, kind: str, revision: str) -> _Answer:
        if self.xet_dir is None:
            return _refuse(404, 'no Xet here')
        self._find(request, repo, write=kind == 'write')
        url, until = f'local://{Path(self.xet_dir).resolve()}', int(time.time()) + 3600
        about = dict(X_Xet_Cas_Url=url, X_Xet_Access_Token='xet', X_Xet_Token_Expiration=until)
        return _Answer(200, {'casUrl': url, 'accessToken': 'xet', 'exp': until}, **about)


_REPO = r'(?P<repo>[^/]+/[^/]+)'
_API = rf'/api/models/{_REPO}'
_REVISION = r'(?P<revision>[^/]+)'
# raw path, method (GET is HEAD too), name of the method that answers
_ROUTES = (
    (r'/api/repos/create', 'POST', 'create'),
    (r'/api/validate-yaml', 'POST', 'validate'),
    (rf'{_API}', 'GET', 'info'),
    (rf'{_API}/revision/{_REVISION}', 'GET', 'info'),
    (rf'{_API}/preupload/{_REVISION}', 'POST', 'preupload'),
    (rf'{_API}/commit/{_REVISION}', 'POST', 'commit'),
    (rf'{_API}/(?P<kind>tag|branch)/(?P<name>[^/]+)', 'POST', 'ref'),
    (rf'{_API}/xet-(?P<kind>read|write)-token/{_REVISION}', 'GET', 'xet'),
    (rf'/{_REPO}\.git/info/lfs/objects/batch', 'POST', 'batch'),
    (r'/storage/(?P<oid>[0-9a-f]+)', 'PUT', 'upload'),
    (r'/storage/(?P<oid>[0-9a-f]+)', 'GET', 'storage'),
    (rf'/{_REPO}/resolve/{_REVISION}/(?P<name>.+)', 'GET', 'resolve'),
)


def _card_errors(text: str) -> List[str]:
    """List the errors for which the Hub refuses a card's metadata."""
    found = re.match(r'\s*---\n(.*?)^---$', text, re.DOTALL | re.MULTILINE)
    try:
        card = yaml.safe_load(found[1]) if found else {}
        if card.get('license', 'mit') not in _LICENSES:
            return [f'"license" must be one of {", ".join(_LICENSES)}']
        models = card.get('base_model', [])
        for model in models if isinstance(models, list) else [models]:
            if not re.fullmatch(r'[\w.-]+/[\w.-]+', model):
                return [f'"base_model" {model!r} is not an id of the Hub']
        for model in card.get('model-index', []):
            for result in model['results']:
                values = [model['name'], result['task']['type'], result['dataset']['type'], result['dataset']['name']]
                values += [metric[key] for metric in result['metrics'] for key in ('type', 'value')]
                if None in values:
                    return ['"model-index" has an empty field']
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as e:
        return [f'{type(e).__name__}: {e}']
    return []


def _read_shard(data: bytes) -> Iterator[Tuple[str, int, str]]:
    """Xet hash, size and SHA-256 of the files in a shard, by which the real Hub knows what the client has uploaded."""

    def hexadecimal(at: int) -> str:
        return ''.join(f'{word:016x}' for word in struct.unpack_from('<4Q', data, at))

    at = 48  # after the shard's header; everything comes in 48 bytes
    while at + 48 <= len(data) and data[at : at + 32] != b'\xff' * 32:
        flags, count = struct.unpack_from('<2I', data, at + 32)
        size = sum(struct.unpack_from('<I', data, at + 48 * (i + 1) + 36)[0] for i in range(count))
        end = at + 48 * (1 + count * (1 + (flags >> 31)))
        if flags >> 30 & 1:
            yield hexadecimal(at), size, hexadecimal(end)
            end += 48
        at = end

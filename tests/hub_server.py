"""A Hub on this machine for tests: HTTP as the unmodified huggingface_hub client speaks it, with faults on demand.

Models only. *.safetensors goes through LFS (or Xet), everything else through the commit itself.
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
from typing import Any, Dict, Iterable, Iterator, List, Mapping, NamedTuple, Optional, Set, Tuple
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

__all__ = ['HubServer', 'Request']

_DATE = '2026-01-01T00:00:00.000Z'
_LICENSES = ('apache-2.0', 'bsd-3-clause', 'cc-by-4.0', 'cc-by-nc-4.0', 'cc0-1.0', 'gpl-3.0', 'mit', 'other', 'unknown')
_REPO = r'(?P<repo>[^/]+/[^/]+)'
_API = rf'/api/models/{_REPO}'
_NO_SHA = b'\xff' * 32


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


class _Commit(NamedTuple):
    oid: str
    parent: Optional[str]
    title: str
    files: Dict[str, _Entry]


@dataclass
class _Repo:
    id: str
    private: bool
    gated: bool
    disabled: bool
    commits: Dict[str, _Commit] = field(default_factory=dict)
    branches: Dict[str, str] = field(default_factory=dict)
    tags: Dict[str, str] = field(default_factory=dict)
    pulls: Dict[str, str] = field(default_factory=dict)
    authors: Dict[str, str] = field(default_factory=dict)  # of the pull requests

    @property
    def owner(self) -> str:
        return self.id.split('/')[0]

    def find(self, revision: str) -> Optional[_Commit]:
        for refs in (self.branches, self.tags, self.pulls):
            if revision in refs:
                return self.commits[refs[revision]]
        return self.commits.get(revision)


class _Answer(Exception):
    """What goes back to the client; an exception too, so that checks can refuse from anywhere."""

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


@dataclass
class _Fault:
    match: str
    action: str
    method: Optional[str]
    left: float
    options: Dict[str, Any]


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: 'HubServer', origin: str):
        self.hub, self.origin = hub, origin
        self.connections: Set[Any] = set()
        super().__init__(('127.0.0.1', 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):  # or a pooled connection would outlive the server
            self.shutdown_request(connection)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def _read(self) -> bytes:
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length') or 0))
        data = b''
        while size := int(self.rfile.readline().split(b';')[0], 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _serve(self) -> None:
        body = self._read()  # always all of it, so that a connection closed early reads the same to every client
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, unquote(url.path), url.query, headers, self.server.origin)
        answer = self.server.hub._answer(request, url.path, body)
        if answer is None:
            self.close_connection = True
            return
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if 'Content-Length' not in answer.headers:
            self.send_header('Content-Length', str(len(answer.body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(answer.body[: answer.cut])
        if answer.cut is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve


class HubServer:
    """The Hub. Its users are in ``tokens`` (token to name); only a namespace's owner creates or writes there."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listeners: List[_Listener] = []
        self.endpoint = self.other_origin = ''
        self.reset()

    def start(self) -> 'HubServer':
        self._listeners = [_Listener(self, 'main'), _Listener(self, 'other')]
        self.endpoint = f'http://127.0.0.1:{self._listeners[0].server_port}'
        self.other_origin = f'http://localhost:{self._listeners[1].server_port}'
        return self

    def close(self) -> None:
        while self._listeners:
            self._listeners.pop().close()

    def __enter__(self) -> 'HubServer':
        return self.start()

    def __exit__(self, *args: Any) -> None:
        self.close()

    def reset(self) -> None:
        """Forget repositories, faults and requests, and set the options back."""
        with self._lock:
            self.tokens: Dict[str, str] = {'hf_owner': 'owner', 'hf_guest': 'guest'}
            self.redirect_storage = False  # LFS files come from other_origin
            self.xet_dir: Optional[Path] = None  # Xet's chunks are kept there, by the client itself
            self.requests: List[Request] = []
            self._faults: List[_Fault] = []
            self._repos: Dict[str, _Repo] = {}
            self._blobs: Dict[str, bytes] = {}

    def add_repo(
        self,
        repo_id: str,
        files: Optional[Mapping[str, bytes]] = None,
        private: bool = False,
        gated: bool = False,
        disabled: bool = False,
    ) -> str:
        """Add a repository, whoever owns it, and return the id of its first commit."""
        with self._lock:
            if repo_id in self._repos:
                raise ValueError(f'{repo_id} exists')
            repo = self._repos[repo_id] = _Repo(repo_id, private, gated, disabled)
            repo.branches['main'] = self._add_commit(repo, None, 'initial commit', self._store(files or {}))
            return repo.branches['main']

    def commit(
        self, repo_id: str, files: Mapping[str, bytes], revision: str = 'main', delete: Iterable[str] = ()
    ) -> str:
        """Add a commit to a branch or pull request and return its id."""
        with self._lock:
            repo = self._repos[repo_id]
            refs = repo.pulls if revision in repo.pulls else repo.branches
            entries = {name: e for name, e in repo.commits[refs[revision]].files.items() if name not in set(delete)}
            refs[revision] = self._add_commit(repo, refs[revision], 'commit', {**entries, **self._store(files)})
            return refs[revision]

    def files(self, repo_id: str, revision: str = 'main') -> Dict[str, bytes]:
        """Names and contents at a revision."""
        with self._lock:
            commit = self._repos[repo_id].find(revision)
            if commit is None:
                raise KeyError(f'{repo_id} has no revision {revision}')
            return {name: self._content(entry) for name, entry in commit.files.items()}

    def exists(self, repo_id: str) -> bool:
        return repo_id in self._repos

    def fault(
        self, match: str, action: str, method: Optional[str] = None, times: Optional[int] = None, **options: Any
    ) -> None:
        """Let the next ``times`` requests (all if None) whose path matches the regular expression go wrong.

        Of several matching faults the one that was set first applies until it is used up.

        Args:
            match: Searched for in the unquoted path.
            action: 'drop' (no answer), 'truncate' (half of the body), 'flip' (a byte near the body's end), 'garbage'
                (as many other bytes), 'status' (status, error_code, message), 'slow' (delay in seconds), or 'redirect'
                (a file's content comes from other_origin). 'truncate', 'flip' and 'garbage' wait for a successful
                answer with a body: not for a HEAD request, not for a redirect to the storage.
            method: Only requests of this method.
        """
        if action not in ('drop', 'truncate', 'flip', 'garbage', 'status', 'slow', 'redirect'):
            raise ValueError(f'no such fault: {action}')
        with self._lock:
            self._faults.append(_Fault(match, action, method, float('inf') if times is None else times, options))

    # --- content ------------------------------------------------------------------------------------------------------

    def _store(self, files: Mapping[str, bytes]) -> Dict[str, _Entry]:
        entries = {}
        for name, data in files.items():
            lfs = name.endswith('.safetensors')
            oid = hashlib.sha256(data).hexdigest() if lfs else _git_sha(data)
            self._blobs[oid] = data
            entries[name] = _Entry(oid, len(data), lfs)
        return entries

    def _add_commit(self, repo: _Repo, parent: Optional[str], title: str, files: Dict[str, _Entry]) -> str:
        text = repr((repo.id, len(repo.commits), parent, title, sorted(files.items())))
        oid = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[oid] = _Commit(oid, parent, title, files)
        return oid

    def _content(self, entry: _Entry) -> bytes:
        if entry.oid not in self._blobs:  # pushed through Xet: the chunks are on the disk only
            self._blobs[entry.oid] = _read_xet(self.xet_dir, entry)
        return self._blobs[entry.oid]

    # --- answers ------------------------------------------------------------------------------------------------------

    def _answer(self, request: Request, raw_path: str, body: bytes) -> Optional[_Answer]:
        with self._lock:
            self.requests.append(request)
            fault = self._take_fault(request, ('drop', 'status', 'slow', 'redirect'))
        action, options = (fault.action, fault.options) if fault else ('', {})
        if action == 'drop':
            return None
        if action == 'slow':  # not time.sleep, which tests take from the client
            threading.Event().wait(options['delay'])
        if action == 'status':
            message = options.get('message', 'a fault was asked for')
            return _refuse(options['status'], message, options.get('error_code'))
        with self._lock:
            try:
                answer = self._route(request, raw_path, body)
            except _Answer as e:
                answer = e
            except Exception as e:
                answer = _refuse(500, f'{type(e).__name__}: {e}')
            if action == 'redirect':
                blob = answer.headers.get('X-Linked-Etag', '').strip('"')
                location = f'/storage/{blob}' if blob else raw_path
                answer.status, answer.body = 302, b''
                answer.headers['Location'] = self.other_origin + location
                answer.headers.pop('Content-Length', None)
            if answer.body and answer.status in (200, 206) and request.method != 'HEAD':
                self._spoil(answer, self._take_fault(request, ('truncate', 'flip', 'garbage')))
        return answer

    def _take_fault(self, request: Request, actions: Tuple[str, ...]) -> Optional[_Fault]:
        for fault in self._faults:
            if fault.action in actions and fault.left > 0 and fault.method in (None, request.method):
                if re.search(fault.match, request.path):
                    fault.left -= 1
                    return fault
        return None

    def _spoil(self, answer: _Answer, fault: Optional[_Fault]) -> None:
        if fault is None:
            return
        size = len(answer.body)
        if fault.action == 'truncate':
            answer.cut = size // 2
        elif fault.action == 'flip':
            position = size - 1 - min(8, size // 2)
            answer.body = answer.body[:position] + bytes([answer.body[position] ^ 1]) + answer.body[position + 1 :]
        else:
            answer.body = bytes(byte ^ 0x5A for byte in answer.body)

    def _route(self, request: Request, raw_path: str, body: bytes) -> _Answer:
        for pattern, method, name in _ROUTES:
            if method == request.method or (method, request.method) == ('GET', 'HEAD'):
                if found := re.fullmatch(pattern, raw_path):
                    if request.origin == 'other' and name != 'storage':
                        break
                    parts = {key: unquote(value) for key, value in found.groupdict().items() if value is not None}
                    return getattr(self, f'_on_{name}')(request, body, **parts)
        return _refuse(404, 'no such page')

    def _user(self, request: Request, needed: bool = False) -> Optional[str]:
        token = request.headers.get('authorization', '').removeprefix('Bearer ')
        if token and token not in self.tokens:
            raise _refuse(401, 'Invalid credentials in Authorization header')
        if needed and not token:
            raise _refuse(401, 'Invalid username or password.')
        return self.tokens.get(token)

    def _find_repo(self, request: Request, repo_id: str, write: bool = False) -> _Repo:
        """The repository if the request may see it or, with ``write``, change it."""
        user = self._user(request)
        repo = self._repos.get(repo_id)
        if repo is None or repo.private and user != repo.owner:
            # the real Hub says 401 to the anonymous, which the client takes for this only over https
            raise _refuse(404, 'Repository not found', 'RepoNotFound')
        if repo.disabled:
            raise _refuse(403, 'Access to this resource is disabled.')
        if write and self._user(request, needed=True) != repo.owner:
            raise _refuse(403, f'You do not have the right to write to {repo_id}')
        return repo

    def _find(self, request: Request, repo_id: str, revision: str) -> Tuple[_Repo, _Commit]:
        repo = self._find_repo(request, repo_id)
        commit = repo.find(revision)
        if commit is None:
            raise _refuse(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repo, commit

    # users, repositories, cards

    def _on_whoami(self, request: Request, body: bytes) -> _Answer:
        user = self._user(request, needed=True)
        auth = {'type': 'access_token', 'accessToken': {'displayName': 'test', 'role': 'write'}}
        return _Answer(200, {'type': 'user', 'id': user, 'name': user, 'fullname': user, 'orgs': [], 'auth': auth})

    def _on_agents(self, request: Request, body: bytes) -> _Answer:
        return _Answer(200, {'standardEnvVars': [], 'harnesses': {}})

    def _on_create(self, request: Request, body: bytes) -> _Answer:
        user, options = self._user(request, needed=True), json.loads(body)
        repo_id = f'{options.get("organization") or user}/{options["name"]}'
        if repo_id.split('/')[0] != user:
            return _refuse(403, f"You don't have the rights to create a model under the namespace {repo_id}")
        if options.get('type', 'model') != 'model':
            return _refuse(400, 'models only')
        url = {'url': f'{self.endpoint}/{repo_id}', 'name': repo_id, 'id': repo_id}
        if repo_id in self._repos:
            return _Answer(409, {'error': 'You already created this model repo', **url})
        private = bool(options.get('private')) or options.get('visibility') == 'private'
        self.add_repo(repo_id, {'.gitattributes': b'*.safetensors filter=lfs diff=lfs merge=lfs -text\n'}, private)
        return _Answer(200, url)

    def _on_validate(self, request: Request, body: bytes) -> _Answer:
        warnings, errors = _check_card(json.loads(body)['content'])
        answer = {'errors': [{'message': e} for e in errors], 'warnings': [{'message': w} for w in warnings]}
        return _Answer(400, {'error': '; '.join(errors), **answer}) if errors else _Answer(200, answer)

    # reading

    def _on_resolve(self, request: Request, body: bytes, repo: str, revision: str, name: str) -> _Answer:
        found, commit = self._find(request, repo, revision)
        if found.gated and self._user(request) != found.owner:
            return _refuse(403, f'Access to model {repo} is restricted', 'GatedRepo')
        if name not in commit.files:
            return _refuse(404, 'Entry not found', 'EntryNotFound', X_Repo_Commit=commit.oid)
        entry = commit.files[name]
        about = dict(X_Repo_Commit=commit.oid, X_Linked_Etag=f'"{entry.oid}"', X_Linked_Size=entry.size)
        if entry.xet:
            token = f'{self.endpoint}/api/models/{repo}/xet-read-token/{commit.oid}'
            about.update(X_Xet_Hash=entry.xet, Link=f'<{token}>; rel="xet-auth"')
        # The client follows a HEAD's redirect within one origin, where the headers above would be lost: the real
        # Hub's storage is always elsewhere.
        if entry.lfs and (request.method == 'GET' or self.redirect_storage):
            origin = self.other_origin if self.redirect_storage else self.endpoint
            return _Answer(302, Location=f'{origin}/storage/{entry.oid}', **about)
        if request.method == 'HEAD':
            return _Answer(200, ETag=f'"{entry.oid}"', Content_Length=entry.size, Accept_Ranges='bytes', **about)
        return _send(request, self._content(entry), entry.oid, **about)

    def _on_storage(self, request: Request, body: bytes, oid: str) -> _Answer:
        return _send(request, self._content(self._find_object(oid, 404)), oid)

    def _on_info(self, request: Request, body: bytes, repo: str, revision: str = 'main') -> _Answer:
        found, commit = self._find(request, repo, revision)
        siblings = [{'rfilename': name} for name in sorted(commit.files)]
        card: Any = {}
        if 'README.md' in commit.files:
            card, _ = _front_matter(self._content(commit.files['README.md']).decode('utf-8', 'replace'))
        card = card if isinstance(card, dict) else {}
        info: Dict[str, Any] = {
            'id': repo,
            'modelId': repo,
            'author': found.owner,
            'sha': commit.oid,
            'siblings': siblings,
        }
        info.update(private=found.private, gated='auto' if found.gated else False, disabled=found.disabled, likes=0)
        info.update(lastModified=_DATE, createdAt=_DATE, downloads=0, tags=card.get('tags') or [], cardData=card)
        info.update({key: card[key] for key in ('library_name', 'pipeline_tag') if key in card})
        return _Answer(200, json.loads(json.dumps(info, default=str)))

    def _on_tree(self, request: Request, body: bytes, repo: str, revision: str, folder: str = '') -> _Answer:
        _, commit = self._find(request, repo, revision)
        query = {key: values[0].lower() for key, values in parse_qs(request.query).items()}
        start, found = f'{folder}/' if folder else '', {}
        for name, entry in sorted(commit.files.items()):
            if name.startswith(start):
                for parent in reversed(Path(name).parents[:-1]):
                    if parent.as_posix().startswith(start):
                        found[parent.as_posix()] = _describe(parent.as_posix(), None)
                found[name] = _describe(name, entry)
        if folder and not found:
            return _refuse(404, f'{folder} does not exist', 'EntryNotFound')
        deep = query.get('recursive') == 'true'
        return _Answer(200, [info for name, info in found.items() if deep or '/' not in name[len(start) :]])

    def _on_refs(self, request: Request, body: bytes, repo: str) -> _Answer:
        found = self._find_repo(request, repo)
        answer: Dict[str, Any] = {'converts': []}
        groups = (('branches', 'refs/heads/', found.branches), ('tags', 'refs/tags/', found.tags))
        for key, prefix, refs in (*groups, ('pullRequests', '', found.pulls)):
            answer[key] = [{'name': name, 'ref': prefix + name, 'targetCommit': oid} for name, oid in refs.items()]
        return _Answer(200, answer)

    # writing

    def _find_target(self, request: Request, repo_id: str, revision: str) -> Tuple[_Repo, Dict[str, str]]:
        """The repository and those of its references that a commit to this revision may move."""
        proposes = 'create_pr' in parse_qs(request.query)
        repo = self._find_repo(request, repo_id)
        user = self._user(request, needed=True)
        refs = repo.pulls if revision in repo.pulls else repo.branches
        if not proposes and user not in (repo.owner, repo.authors.get(revision)):
            raise _refuse(403, f'You do not have the right to write to {repo_id}')
        if revision not in refs and not (proposes and repo.find(revision)):
            raise _refuse(404, f'Invalid rev id: {revision}', 'RevisionNotFound')
        return repo, refs

    def _on_preupload(self, request: Request, body: bytes, repo: str, revision: str) -> _Answer:
        found, _ = self._find_target(request, repo, revision)
        there, files = found.find(revision), []
        for file in json.loads(body)['files']:
            mode = 'lfs' if file['path'].endswith('.safetensors') else 'regular'
            info: Dict[str, Any] = {'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False}
            if there and file['path'] in there.files:
                info['oid'] = there.files[file['path']].oid
            files.append(info)
        return _Answer(200, {'files': files})

    def _on_batch(self, request: Request, body: bytes, repo: str) -> _Answer:
        batch = json.loads(body)
        self._find_repo(request, repo, write='ref' in batch)  # a pull request's objects come without
        self._user(request, needed=True)
        objects: List[Dict[str, Any]] = []
        for wanted in batch['objects']:
            objects.append({'oid': wanted['oid'], 'size': wanted['size']})
            if wanted['oid'] not in self._blobs:
                href = f'{self.endpoint}/storage/{wanted["oid"]}'
                objects[-1]['actions'] = {'upload': {'href': href}}
        return _Answer(200, {'transfer': 'basic', 'objects': objects}, Content_Type='application/vnd.git-lfs+json')

    def _on_upload(self, request: Request, body: bytes, oid: str) -> _Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return _refuse(400, 'the content does not have this SHA-256')
        self._blobs[oid] = body
        return _Answer(200, ETag=f'"{oid}"')

    def _on_commit(self, request: Request, body: bytes, repo: str, revision: str) -> _Answer:
        found, refs = self._find_target(request, repo, revision)
        parent = found.find(revision)
        assert parent is not None
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line['value'] for line in lines if line['key'] == 'header')
        if not parent.oid.startswith(header.get('parentCommit', '')):
            return _refuse(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(parent.files)
        for line in lines:
            key, value = line['key'], line['value']
            if key == 'file':
                data = base64.b64decode(value['content'], validate=True)
                self._blobs[_git_sha(data)] = data
                files[value['path']] = _Entry(_git_sha(data), len(data), False)
            elif key == 'lfsFile':
                files[value['path']] = self._find_object(value['oid'])
            elif key in ('deletedFile', 'deletedFolder'):
                path = value['path'].rstrip('/')
                gone = [n for n in files if n == path or key == 'deletedFolder' and n.startswith(f'{path}/')]
                if not gone:
                    return _refuse(404, "A file with this name doesn't exist", 'EntryNotFound')
                for name in gone:
                    del files[name]
        oid = self._add_commit(found, parent.oid, header['summary'], files)
        answer = {'success': True, 'commitOid': oid, 'commitUrl': f'{self.endpoint}/{repo}/commit/{oid}'}
        if 'create_pr' in parse_qs(request.query):
            answer['pullRequestUrl'] = f'{self.endpoint}/{repo}/discussions/{self._open(request, found, oid)}'
        else:
            refs[revision] = oid
        return _Answer(200, answer)

    def _find_object(self, oid: str, status: int = 400) -> _Entry:
        if oid in self._blobs:
            return _Entry(oid, len(self._blobs[oid]), True)
        for path in self.xet_dir.rglob('shards/*.mdb') if self.xet_dir else ():
            for xet, size, sha256 in _read_shard(path.read_bytes()):
                if sha256 == oid:
                    return _Entry(oid, size, True, xet)
        raise _refuse(status, f'LFS object {oid} has not been uploaded')

    def _open(self, request: Request, repo: _Repo, oid: str) -> int:
        number = len(repo.pulls) + 1
        repo.pulls[f'refs/pr/{number}'] = oid
        repo.authors[f'refs/pr/{number}'] = self._user(request) or ''
        return number

    def _on_pull(self, request: Request, body: bytes, repo: str, number: str = '') -> _Answer:
        """With Xet the client opens an empty pull request first, asks about it and then commits to it."""
        found = self._find_repo(request, repo)
        if request.method == 'POST':
            self._user(request, needed=True)
            return _Answer(200, {'num': self._open(request, found, found.branches['main'])})
        about: Dict[str, Any] = {
            'author': {'name': found.authors[f'refs/pr/{number}']},
            'repo': {'name': repo, 'type': 'model'},
        }
        about.update(changes={'base': 'refs/heads/main'}, filesWithConflicts=[], events=[], isPullRequest=True)
        return _Answer(200, {'num': int(number), 'title': '', 'status': 'draft', 'createdAt': _DATE, **about})

    def _on_ref(self, request: Request, body: bytes, repo: str, kind: str, name: str) -> _Answer:
        found, options = self._find_repo(request, repo, write=True), json.loads(body)
        if kind == 'tag':
            refs, name, start = found.tags, options['tag'], name
        else:
            refs, start = found.branches, options.get('startingPoint') or 'main'
        if name in refs:
            return _refuse(409, 'Reference already exists')
        refs[name] = self._find(request, repo, start)[1].oid
        return _Answer(200, {})

    def _on_xet(self, request: Request, body: bytes, repo: str, kind: str, revision: str) -> _Answer:
        if self.xet_dir is None:
            return _refuse(404, 'no Xet here')
        self._find_repo(request, repo, write=kind == 'write' and 'create_pr' not in parse_qs(request.query))
        url, until = f'local://{Path(self.xet_dir).resolve()}', int(time.time()) + 3600
        about = dict(X_Xet_Cas_Url=url, X_Xet_Access_Token='xet', X_Xet_Token_Expiration=until)
        return _Answer(200, {'casUrl': url, 'accessToken': 'xet', 'exp': until}, **about)


# raw path, method (GET is HEAD too), name of the method that answers
_ROUTES = (
    (r'/api/whoami-v2', 'GET', 'whoami'),
    (r'/api/agent-harnesses', 'GET', 'agents'),
    (r'/api/repos/create', 'POST', 'create'),
    (r'/api/validate-yaml', 'POST', 'validate'),
    (rf'{_API}', 'GET', 'info'),
    (rf'{_API}/revision/(?P<revision>[^/]+)', 'GET', 'info'),
    (rf'{_API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?', 'GET', 'tree'),
    (rf'{_API}/refs', 'GET', 'refs'),
    (rf'{_API}/preupload/(?P<revision>[^/]+)', 'POST', 'preupload'),
    (rf'{_API}/commit/(?P<revision>[^/]+)', 'POST', 'commit'),
    (rf'{_API}/discussions', 'POST', 'pull'),
    (rf'{_API}/discussions/(?P<number>\d+)', 'GET', 'pull'),
    (rf'{_API}/(?P<kind>branch|tag)/(?P<name>[^/]+)', 'POST', 'ref'),
    (rf'{_API}/xet-(?P<kind>read|write)-token/(?P<revision>[^/]+)', 'GET', 'xet'),
    (rf'/{_REPO}\.git/info/lfs/objects/batch', 'POST', 'batch'),
    (r'/storage/(?P<oid>[0-9a-f]+)', 'PUT', 'upload'),
    (r'/storage/(?P<oid>[0-9a-f]+)', 'GET', 'storage'),
    (rf'/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)', 'GET', 'resolve'),
)


def _git_sha(data: bytes) -> str:
    return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()


def _send(request: Request, data: bytes, etag: str, **headers: Any) -> _Answer:
    """The content, or the range of it that was asked for."""
    headers.update(ETag=f'"{etag}"', Accept_Ranges='bytes', Content_Type='application/octet-stream')
    asked = re.fullmatch(r'bytes=(\d*)-(\d*)', request.headers.get('range', ''))
    if asked is None or not any(asked.groups()) or request.headers.get('if-range', f'"{etag}"') != f'"{etag}"':
        return _Answer(200, data, **headers)
    first, last = asked.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if start > end:
        return _Answer(416, Content_Range=f'bytes */{len(data)}')
    return _Answer(206, data[start : end + 1], Content_Range=f'bytes {start}-{end}/{len(data)}', **headers)


def _describe(name: str, entry: Optional[_Entry]) -> Dict[str, Any]:
    """A file, or without entry a folder, as listings have it."""
    if entry is None:
        return {'type': 'directory', 'path': name, 'size': 0, 'oid': hashlib.sha1(name.encode()).hexdigest()}
    about: Dict[str, Any] = {'type': 'file', 'path': name, 'size': entry.size, 'oid': entry.oid}
    if entry.lfs:
        text = f'version https://git-lfs.github.com/spec/v1\noid sha256:{entry.oid}\nsize {entry.size}\n'
        about.update(oid=_git_sha(text.encode()), lfs={'oid': entry.oid, 'size': entry.size, 'pointerSize': len(text)})
    return {**about, 'xetHash': entry.xet} if entry.xet else about


def _front_matter(text: str) -> Tuple[Any, Optional[str]]:
    """Metadata of a card (None if it has none) and what is wrong with its YAML."""
    found = re.match(r'\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$', text, re.DOTALL | re.MULTILINE)
    try:
        return (yaml.safe_load(found[1]) if found else None), None
    except yaml.YAMLError as e:
        return None, f'YAML: {e}'


def _check_card(text: str) -> Tuple[List[str], List[str]]:
    """Warnings and errors."""
    card, error = _front_matter(text)
    if error:
        return [], [error]
    if card is None:
        return ['empty or missing yaml metadata in repo card'], []
    if not isinstance(card, dict):
        return [], ['the metadata must be a mapping']
    errors = []
    if 'license' in card and card['license'] not in _LICENSES:
        errors.append(f'"license" must be one of {", ".join(_LICENSES)}')
    models = card.get('base_model', [])
    for model in models if isinstance(models, list) else [models]:
        if not isinstance(model, str) or not re.fullmatch(r'[\w.-]+/[\w.-]+', model):
            errors.append(f'"base_model" {model!r} is not an id of the Hub')
    index = card.get('model-index', [])
    for i, model in enumerate(index if isinstance(index, list) else [None]):
        results = _get(model, 'results')
        if not isinstance(_get(model, 'name'), str) or not isinstance(results, list) or not results:
            errors.append(f'"model-index[{i}]" needs a name and results')
            continue
        for result in results:
            metrics = _get(result, 'metrics')
            places = [('task', _get(result, 'task'), ('type',)), ('dataset', _get(result, 'dataset'), ('type', 'name'))]
            places += [
                ('metrics', m, ('type', 'value')) for m in (metrics if isinstance(metrics, list) else []) or [None]
            ]
            for key, value, fields in places:
                if any(_get(value, field) is None for field in fields):
                    errors.append(f'"model-index[{i}].results.{key}" needs {" and ".join(fields)}')
    return [], errors


def _get(mapping: Any, key: str) -> Any:
    return mapping.get(key) if isinstance(mapping, dict) else None


def _read_shard(data: bytes) -> Iterator[Tuple[str, int, str]]:
    """Xet hash, size and SHA-256 of the files in a shard, by which the real Hub knows what the client has uploaded."""

    def hexadecimal(at: int) -> str:
        return ''.join(f'{word:016x}' for word in struct.unpack_from('<4Q', data, at))

    at = 48  # after the shard's header; everything comes in 48 bytes
    while at + 48 <= len(data) and data[at : at + 32] != _NO_SHA:
        flags, count = struct.unpack_from('<2I', data, at + 32)
        size = sum(struct.unpack_from('<I', data, at + 48 * (i + 1) + 36)[0] for i in range(count))
        end = at + 48 * (1 + count * (1 + (flags >> 31)))
        if flags >> 30 & 1:
            yield hexadecimal(at), size, hexadecimal(end)
            end += 48
        at = end


def _read_xet(folder: Optional[Path], entry: _Entry) -> bytes:
    """What the chunks on the disk make up; fails while another process has them open."""
    from tempfile import TemporaryDirectory

    import hf_xet

    with TemporaryDirectory() as temporary:
        path = Path(temporary) / 'file'
        options = dict(endpoint=f'local://{Path(folder or "").resolve()}', token='xet')
        with hf_xet.XetSession().new_file_download_group(
            **options, token_expiry_unix_secs=int(time.time()) + 3600
        ) as group:
            group.start_download_file(hf_xet.XetFileInfo(entry.xet, entry.size), str(path))
        return path.read_bytes()

"""The tour as people meet it: opened in a real JupyterLab, in a real browser, and run from top to bottom.

Needs Chromium (any of `chromium`, `chromium-browser`, `google-chrome` on the PATH). Without it the tests are skipped,
except where NOISYSEG_REQUIRE_BROWSER=1 or CI is set: there its absence is a failure. Screenshots of failures go to
NOISYSEG_SCREENSHOTS."""
import functools
import http.server
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import copy_project, root

tour = os.environ.get('NOISYSEG_TOUR', 'nbs/tutorials/tour.ipynb')
patience = int(os.environ.get('NOISYSEG_TOUR_SECONDS', 1800))   # six minutes; on a slow and busy machine over fourteen
flags = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking',
         '--disable-component-update', '--disable-sync']


def browser_path():
    "Where Chromium is; a skip or a failure where it is not"
    for name in 'chromium', 'chromium-browser', 'google-chrome':
        if path := shutil.which(name): return path
    missing = 'no Chromium on the PATH, so nothing was tried in a browser (on Debian: apt-get install chromium)'
    if os.environ.get('NOISYSEG_REQUIRE_BROWSER') == '1' or os.environ.get('CI'): pytest.fail(missing, pytrace=False)
    pytest.skip(missing)


@contextmanager
def jupyterlab(project, home):
    "A JupyterLab on a copy of the project, with settings of its own: gives its address and its token"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token, log = secrets.token_hex(16), home/'jupyterlab.log'
    folders = {f'JUPYTER_{o}_DIR': str(home/o.lower()) for o in ('CONFIG', 'DATA', 'RUNTIME')}
    env = {**os.environ, **folders, 'JUPYTER_PREFER_ENV_PATH': '1', 'JUPYTER_TOKEN': token,
           'IPYTHONDIR': str(home/'ipython'),
           'PLOTLY_RENDERER': 'plotly_mimetype', 'JUPYTERLAB_SETTINGS_DIR': str(home/'settings')}
    cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1',
           f'--ServerApp.port={port}',
           '--ServerApp.port_retries=0', f'--ServerApp.root_dir={project}', '--LabApp.expose_app_in_browser=True',
           f'--LabApp.workspaces_dir={home/"workspaces"}', '--LabApp.news_url=None',
           '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(log, 'w') as f: server = subprocess.Popen(cmd, cwd=project, env=env, stdout=f, stderr=f)
    url = f'http://127.0.0.1:{port}'
    try:
        for _ in range(300):
            assert server.poll() is None, f'JupyterLab ended:\n{log.read_text()}'
            try: urllib.request.urlopen(f'{url}/api/status?token={token}').read()
            except OSError: time.sleep(.2)
            else: break
        yield url, token
    finally:
        server.terminate()                     # it ends its kernels too
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill()


running = []


@contextmanager
def playwright():
    "Playwright, once in a process: it cannot be started again while it runs"
    from playwright.sync_api import sync_playwright
    if running:
        yield running[0]
        return
    with sync_playwright() as p:
        running.append(p)
        try: yield p
        finally: running.clear()


@contextmanager
def browser_page(profile):
    "A page of a headless Chromium with a fresh profile"
    path = browser_path()
    with playwright() as p:
        context = p.chromium.launch_persistent_context(profile, executable_path=path, args=flags,
                                                       viewport=dict(width=1400, height=1000))
        page = context.new_page()
        page.complaints = []
        page.on('pageerror', lambda e: page.complaints.append(f'uncaught: {e}'))
        page.on('console', lambda m: m.type == 'error' and page.complaints.append(
                f'{m.text} ({m.location.get("url", "")})'))
        try: yield page
        finally: context.close()


@contextmanager
def opened(home):
    "JupyterLab on a copy of the project, and a browser: (project, page, url, token)"
    browser_path()
    project = copy_project(home/'project')
    with jupyterlab(project, home) as (url, token), browser_page(home/'profile') as page:
        yield project, page, url, token


def wait_until(page, condition, seconds=60, arg=None):
    "Waits for a condition in JavaScript. It is asked four times a second: at each frame, all that time would be drawn"
    page.wait_for_function(condition, arg=arg, timeout=seconds * 1000, polling=250)


def write_notebook(path, *sources):
    "A new notebook with these cells"
    code = lambda o: dict(cell_type='code', id=secrets.token_hex(4), metadata={}, source=o, outputs=[],
                          execution_count=None)
    path.write_text(json.dumps(dict(cells=[code(o) for o in sources], nbformat=4, nbformat_minor=5,
                                    metadata=dict(kernelspec=dict(name='python3', display_name='python3')))))


def start_notebook(page, url, token, path):
    "Opens a notebook and runs its cells, without waiting for their end: `window.outcome` says when that is"
    page.goto(f'{url}/lab/tree/{path}?token={token}&reset')
    wait_until(page, '''() => {
        const panel = window.jupyterapp?.shell.currentWidget
        return panel?.sessionContext?.isReady && panel.content.model?.cells.length > 0
            && panel.sessionContext.session?.kernel?.status === "idle" }''', 120)
    page.evaluate('''() => {
        window.outcome = null
        jupyterapp.commands.execute("notebook:run-all-cells").finally(() => { window.outcome = "done" }) }''')


def cells_of(page):
    "The cells of the notebook that is open, as JSON"
    return page.evaluate('() => [...jupyterapp.shell.currentWidget.content.model.cells].map(c => c.toJSON())')


def run_notebook(page, url, token, path, seconds):
    "Opens a notebook, runs all its cells, and gives its cells as JSON"
    start_notebook(page, url, token, path)
    wait_until(page, '() => window.outcome !== null', seconds)
    return cells_of(page)


def problems(cells):
    "What went wrong in a notebook that was run: cells with an error, cells that did not run"
    text = lambda c: ''.join(c['source'])
    for c in cells:
        if c['cell_type'] != 'code' or not text(c).strip(): continue
        for o in c['outputs']:
            if o['output_type'] == 'error': yield f'{o["ename"]}: {o["evalue"]}\nin the cell\n{text(c)}'
        if c['execution_count'] is None: yield f'not run:\n{text(c)}'


NAMED = {'button', 'checkbox', 'combobox', 'DisclosureTriangle', 'img', 'image', 'link', 'listbox', 'ProgressIndicator',
         'slider', 'spinbutton', 'textbox'}


def nameless(page, selector='body'):
    "Roles of controls and pictures below `selector` that have no name in the accessibility tree"
    session = page.context.new_cdp_session(page)
    top = session.send('DOM.getDocument')['root']['nodeId']
    node = session.send('DOM.querySelector', dict(nodeId=top, selector=selector))['nodeId']
    found = [n for n in session.send('Accessibility.queryAXTree', dict(nodeId=node))['nodes'] if not n['ignored']]
    value = lambda n, key: n.get(key, {}).get('value', '')
    seen = [n for n in found if value(n, 'role') in NAMED]
    assert len(seen) > 5, 'there should be controls'
    return [value(n, 'role') for n in seen if not value(n, 'name').strip()]


def unreachable(page, selector='body'):
    "Controls below `selector` that the Tab key does not reach, or that do not show it"
    page.evaluate('document.activeElement?.blur()')        # Tab goes on from where the focus was, and round
    dim = []
    for _ in range(300):
        page.keyboard.press('Tab')
        at = page.evaluate("""() => { const e = document.activeElement
            if (!e || e === document.body) return ['the page itself', true]
            if (e.dataset.reached) return null
            e.dataset.reached = 1
            const s = getComputedStyle(e)
            return [e.outerHTML.slice(0, 90), s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 1] }""")
        if at is None: break
        if not at[1]: dim.append(at[0])
    return dim + page.evaluate("""s => [...document.querySelector(s).querySelectorAll(
        'button, input, select, summary, a[href]')].filter(e => e.checkVisibility() && !e.disabled)
        .filter(e => !e.dataset.reached).map(e => e.outerHTML.slice(0, 90))""", selector)


def ours(complaints):
    "Complaints of the browser that are not about files that JupyterLab or the network did not deliver"
    return [o for o in complaints if not re.search(r'Failed to load resource|net::ERR_|cdn\.plot\.ly', o)]


@pytest.fixture
def lab(in_jupyterlab, request):
    "A page, and a function that runs a notebook of a copy of the project in it"
    project, page, url, token = in_jupyterlab
    page.complaints.clear()
    yield project, page, lambda path, seconds: run_notebook(page, url, token, path, seconds)
    if request.node.failed:
        folder = Path(os.environ.get('NOISYSEG_SCREENSHOTS', root/'test-screenshots'))
        page.screenshot(path=folder/f'{request.node.name}.png')
        print(f'The page as it was: {folder/request.node.name}.png')


@contextmanager
def served(folder, headers=()):
    "A plain file server, which says `headers` (name, value) with each file"
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args): pass
        def end_headers(self):
            for name, value in headers: self.send_header(name, value)
            super().end_headers()
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try: yield f'http://127.0.0.1:{server.server_port}'
        finally: server.shutdown()


@pytest.mark.timeout(patience + 60)
def test_tour_in_jupyterlab(lab):
    "Every cell of the tour runs, none shows an error, and the browser does not complain"
    _, page, run = lab
    cells = run(tour, patience)
    assert not list(problems(cells))
    assert not ours(page.complaints)


def test_a_broken_notebook_is_seen(lab):
    "What the test above relies on: an error in a cell is found, with the cells that it kept from running"
    project, _, run = lab
    write_notebook(project/'nbs'/'broken.ipynb', '1+1', '1/0', '2+2')
    found = list(problems(run('nbs/broken.ipynb', 60)))
    assert [o.split('\n')[0] for o in found] == ['ZeroDivisionError: division by zero', 'not run:']

"""How fast is noisyseg beside the plain way to do the same, and beside its peers? `make bench` calls this.

Both ways run in one process, in turns, after a warm-up and after a check that their results agree. Each group has a
process of its own, because what one leaves in the memory allocator would change the other's times. The ratio is
ours / other, median over the turns: below 1 is faster. Without --full it takes at most five minutes, whatever the
processor, and two more with peers: a job that would take longer is cut short, and a row says so. Each whole run is
appended to nbs/benchmarks/results.jsonl, which the page nbs/benchmarks.ipynb draws.
"""
import argparse
import datetime
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from bench_timing import Plan, skipped

root = Path(__file__).resolve().parents[1]
RESULTS = root/'nbs'/'benchmarks'/'results.jsonl'
JOBS = [  # group, module and function that yields its rows, the seconds that it takes in quick mode (0: in full only)
    ('perturb', 'bench_perturb:unet3plus', 17), ('perturb', 'bench_perturb:resnet50', 0),
    ('decoder', 'bench_decoder:decoder', 40), ('branches', 'bench_decoder:branches', 16),
    ('step', 'bench_training:step', 38), ('sweeps', 'bench_sweeps:sweeps', 47),
    ('methods', 'bench_training:methods', 31), ('explorer', 'bench_explorer:explorer', 80),
    ('explorer', 'bench_live:slider', 0), ('peers', 'bench_peers:peers', 5)]
PATIENCE = {False: 290, True: 9 * 3600}   # seconds for all jobs, quick or full: a quick run ends within five minutes
PEERS = 100   # what they add to it, where there are some
GROUPS = list(dict.fromkeys(g for g, *_ in JOBS))


def share(left, mine, others):
    """The seconds that the next job may take, of those that are left: it usually takes `mine`, and the jobs after it
    `others`. Half as long again as its part of them, but those after it keep half of theirs."""
    part = mine / (mine + others)
    return left * min(1.5 * part, (1 + part) / 2)

def ended(cmd, env, seconds):
    "The status of a command, and its errors; None where it took too long. Then, or after Ctrl-C, all of it ends."
    p = subprocess.Popen(cmd, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                         start_new_session=True)
    try:
        _, said = p.communicate(timeout=seconds)
        return p.returncode, said
    except BaseException as e:
        if os.name == 'posix': os.killpg(p.pid, signal.SIGKILL)   # a browser and its JupyterLab, too
        else: p.kill()
        p.wait()
        if isinstance(e, subprocess.TimeoutExpired): return None, ''
        raise

def measure(job, a, seconds):
    "In a process of its own: the rows of one job, and what went wrong (its last words), if something did."
    group, what, _ = job
    with tempfile.NamedTemporaryFile('r', suffix='.jsonl') as f:
        python, env = sys.executable, dict(os.environ)
        if group == 'peers' and a.peers:
            python, own = a.peers, [p for p in sys.path if 'site-packages' in p]
            given = os.environ.get('PYTHONPATH', '').split(os.pathsep)
            # first what is here, then what is only there
            env['PYTHONPATH'] = os.pathsep.join([str(root), *own, *filter(None, given)])
        cmd = [python, __file__, '--job', what, '--rows', f.name, '--device', a.device]
        cmd += (['--full'] if a.full else []) + (['--rounds', str(a.rounds)] if a.rounds else [])
        status, said = ended(cmd, env, seconds)
        rows = [json.loads(line) for line in f]
    if status is None: rows.append(skipped(what, f'the rest would take over {seconds:.0f} s on this processor'))
    elif status:
        print(said, file=sys.stderr)
        rows.append(skipped(what, f'failed: {(said.strip().splitlines() or [f"status {status}"])[-1]}')
                    | {'failed': True})
    return [{'group': group, **r} for r in rows]

def hardware(device):
    model = platform.processor() or platform.machine()
    if (info := Path('/proc/cpuinfo')).exists():
        model = next((line.split(':')[1].strip() for line in info.read_text().splitlines()
                      if line.startswith('model name')), model)
    instructions = torch.backends.cpu.get_cpu_capability()   # decides more than the model, which may be a mere brand
    return {'cpu': f'{model}, {instructions}', 'cores': os.cpu_count(), 'threads': torch.get_num_threads(),
            'gpu': torch.cuda.get_device_name(device) if device != 'cpu' else None,
            'device': device, 'system': platform.system()}

def commit():
    "Commit, and whether the code differs from it; the results and the page that draws them don't count."
    git = lambda *args: subprocess.run(['git', *args], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                       text=True, check=True).stdout.strip()
    try:
        return {'commit': git('rev-parse', '--short', 'HEAD'), 'dirty': bool(git('status', '--porcelain', '--', '.',
                ':!nbs/benchmarks*'))}
    except (OSError, subprocess.CalledProcessError): return {'commit': None, 'dirty': None}

def number(v): return '' if v is None else f'{v:.2e}' if abs(v) < 0.01 else f'{v:.3g}' if abs(v) < 100 else f'{v:,.0f}'

def cells(r):
    spread = f'({r["low"]:.2f}–{r["high"]:.2f})' if r['rounds'] > 1 and r['low'] is not None else ''
    ns, of = r.get('ns_per_weight'), {'ns_per_weight': ' ns', 'ours': f' {r["unit"]}'}.get(r['target_of'], '')
    target = f'≤ {r["target"]:.3g}{of}' if r['target'] else ''
    unit, ratio = r['unit'] if r['ours'] is not None else '', '' if r['ratio'] is None else f'{r["ratio"]:.2f}'
    verdict = r['verdict'].upper() if r['verdict'] in ('worse', 'target missed') else r['verdict']
    ns = f'{ns:.2f} ns/weight' if ns else ''
    return [r['what'], r['where'], number(r['ours']), unit, ns, r['against'], number(r['other']), ratio, spread,
            target, verdict]

HEAD = ['', '', 'ours', 'unit', '', 'beside', 'other', 'ratio', '10–90 %', 'target', '']

def table(rows):
    "All rows as text, one line each; notes below them where they say more."
    lines = [HEAD] + [cells(r) for r in rows]
    width = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
    right = {2, 4, 6, 7, 8}
    text = lambda line: '  '.join(c.rjust(w) if i in right else c.ljust(w) for i,
                                  (c, w) in enumerate(zip(line, width))).rstrip()
    out = [text(HEAD)]
    for group in GROUPS:
        if mine := [r for r in rows if r['group'] == group]:
            out += ['', group.upper()]
            for r in mine: out += [text(cells(r))] + ([f'    {r["note"]}'] if r['note'] else [])
    return '\n'.join(out)

def run(a):
    jobs = [j for j in JOBS if j[0] in a.only and (a.full or j[2])]
    usual = [PEERS if j[0] == 'peers' and a.peers else j[2] or 60 for j in jobs]
    patience = PATIENCE[a.full] + (PEERS if a.peers else 0)
    started, rows, load = time.time(), [], getattr(os, 'getloadavg', lambda: [None])()[0]
    for i, job in enumerate(jobs):
        begun = time.time()
        print(f'{i + 1} of {len(jobs)}: {job[1].replace(":", ", ")} … ', end='', flush=True)
        rows += measure(job, a, share(patience - (begun - started), usual[i], sum(usual[i + 1:])))
        print(f'{time.time() - begun:.0f} s', flush=True)
    versions = {'python': platform.python_version(), **{n: version(n) for n in ('torch', 'torchvision', 'noisyseg')}}
    result = {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), **commit(), 'mode': 'full'
              if a.full else 'quick',
              'seconds': round(time.time() - started), 'load': load, **hardware(a.device), 'versions': versions,
              'rows': rows}
    machine = f'{result["cpu"]}, {result["threads"]} of {result["cores"]} cores' + (f', {result["gpu"]}'
            if result['gpu'] else '')
    print(f'\n{table(rows)}\n\nratio = ours / other, below 1 is less. {machine}; '
          f'commit {result["commit"]}{" and changes" if result["dirty"] else ""}; {result["mode"]}, '
          f'{result["seconds"]} s')
    if load is not None and load > 0.5:
        print(f'Something else was at work here when it began (load {load:.1f}): repeat on a quiet machine.')
    if not a.no_save and set(a.only) == set(GROUPS):   # the page shows whole runs
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, 'a') as f: f.write(json.dumps(result, ensure_ascii=False) + '\n')
        print(f'appended to {RESULTS.relative_to(root)}')
    return 1 if any(r.get('failed') for r in rows) else 0

def one_job(a):
    module, function = a.job.split(':')
    torch.manual_seed(0)
    with open(a.rows, 'a') as f:
        for r in getattr(importlib.import_module(module), function)(Plan(a.full, a.rounds, a.device)):
            f.write(json.dumps(r, ensure_ascii=False) + '\n')
            f.flush()

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--full', action='store_true', help='more cases and more turns: about half an hour')
    p.add_argument('--only', type=lambda s: s.split(','), default=GROUPS,
                   help=f'some of {",".join(GROUPS)}; printed, not saved')
    p.add_argument('--rounds', type=int,
                   help='turns of each comparison; by default as many as fit into a second, at least 2; '
                        'with --full into 20 seconds, at least 7')
    p.add_argument('--no-save', action='store_true', help='print only')
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                   help='cpu or cuda; by default the GPU if there is one')
    p.add_argument('--peers', metavar='PYTHON',
                   help='the Python of an environment that has the peers; see bench_peers.py')
    p.add_argument('--job', help=argparse.SUPPRESS)
    p.add_argument('--rows', help=argparse.SUPPRESS)
    a = p.parse_args()
    if unknown := set(a.only) - set(GROUPS):
        p.error(f'--only: there is no group {", ".join(unknown)}; there are {", ".join(GROUPS)}')
    sys.exit(one_job(a) if a.job else run(a))

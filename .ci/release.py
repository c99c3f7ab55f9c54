"""Is this checkout fit to be the release of a tag? `python .ci/release.py v0.1.0` says what differs; `--notes` prints
what CHANGELOG.md says about that version. Needs Python alone."""
import re
import sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parents[1]


def differences(tag, root=root):
    "Where another version stands than the tag's, and changes that no version has yet"
    cfg = ConfigParser()
    cfg.read(root/'settings.ini', encoding='utf-8')
    read = lambda name: (root/name).read_text(encoding='utf-8')
    told = {'settings.ini': cfg['DEFAULT']['version'],
            'noisyseg/__init__.py': re.search('__version__ = "([^"]+)"', read('noisyseg/__init__.py'))[1],
            'CITATION.cff': re.search('^version: (.+)$', read('CITATION.cff'), re.M)[1],
            'CHANGELOG.md': re.search(r'^## (\S+)', read('CHANGELOG.md'), re.M)[1]}
    return [f'{name} says {version}, the tag {tag}' for name, version in told.items() if f'v{version}' != tag]


def notes(version, root=root):
    "The section of CHANGELOG.md about a version"
    text = (root/'CHANGELOG.md').read_text(encoding='utf-8')
    found = re.search(rf'^## {re.escape(version)}\b[^\n]*\n(.*?)(?=^## |\Z)', text, re.M | re.S)
    if not found: raise SystemExit(f'CHANGELOG.md has no section "## {version}"')
    return found[1].strip()


if __name__ == '__main__':
    if '--notes' in sys.argv: print(notes(sys.argv[1].removeprefix('v')))
    elif found := differences(sys.argv[1]): raise SystemExit('\n'.join(found))

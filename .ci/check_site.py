"""Is the built site fit to be deployed? `python .ci/check_site.py _docs` says what is wrong, and ends with status 1.

Looked at, in each page: links inside the site and their anchors; that nothing is fetched from a foreign host; its
weight; its canonical address, card for sharing and icon; that the search knows each name; and that each page is there
as markdown too. A link that a reader clicks may lead anywhere: no other host is asked here either."""
import json
import posixpath
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import derive

HOME = derive.settings['doc_url'] + '/'
ALLOWED = ()                            # hosts that pages may fetch from. None
LIMIT = 1_500_000                       # bytes of a page with its own pictures and scripts
SHARED = 'site_libs'                    # what all pages have in common: loaded once
SHARED_LIMIT = 4_000_000
HEAVY = ('live',)                       # networks and their engine: it says so, and shows its progress
NOT_QUARTO = ('live', 'explorer')       # pages with a head of their own
FETCHING = {'script': 'src', 'img': 'src', 'source': 'src', 'video': 'src', 'audio': 'src', 'iframe': 'src',
            'embed': 'src', 'object': 'data', 'link': 'href'}
NO_FETCH = {'canonical', 'alternate', 'prev', 'next', 'author', 'license'}   # links in a head that load nothing


class Page(HTMLParser):
    "The links, fetched files, anchors and head of a page"
    def __init__(self, path, root):
        super().__init__()
        self.path, self.address = path, path.relative_to(root).as_posix()
        self.links, self.fetched, self.ids, self.meta, self.rel, self.style = [], [], set(), {}, {}, ''
        self._in = None
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = {k: v or '' for k, v in attrs}
        self._in = tag
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag == 'meta': self.meta[a.get('property') or a.get('name')] = a.get('content', '')
        if tag in ('a', 'area') and a.get('href'): self.links.append(a['href'])
        if tag == 'link': self.rel.setdefault(a.get('rel', ''), a.get('href', ''))
        if tag == 'link' and set(a.get('rel', '').split()) & NO_FETCH: return
        if a.get(FETCHING.get(tag)): self.fetched.append(a[FETCHING[tag]])
        self.fetched += [o.split()[0] for o in a.get('srcset', '').split(',') if o.strip()]

    def handle_data(self, data):
        if self._in == 'style': self.style += data
        if self._in == 'script': self.fetched += re.findall(r'''(?:from|import)\s*\(?\s*['"](https?:[^'"]+)''', data)

    def handle_endtag(self, tag): self._in = None


def in_css(text):
    "What a style sheet fetches"
    return re.findall(r'''@import\s+(?:url\()?['"]?([^'")\s;]+)''', text) + re.findall(
        r'''url\(\s*['"]?([^'")]+)''', text)


def is_foreign(url): return re.match(r'(https?:)?//', url) and urlsplit(url).hostname not in (
    urlsplit(HOME).hostname, *ALLOWED)


def place(url, address):
    "(file below the site, anchor) that an address on a page means; None where it is not of this site"
    if url.startswith(HOME): url, address = url.removeprefix(HOME), 'index.html'
    if re.match(r'[a-z][a-z+.-]*:|//', url): return None
    path, _, anchor = url.partition('#')
    path = unquote(path.partition('?')[0])
    if path.startswith('/'): path = path.removeprefix(urlsplit(HOME).path)
    else: path = posixpath.join(posixpath.dirname(address), path) if path else address
    path = posixpath.normpath(path)
    return path, unquote(anchor)


def dead_links(page, pages, root):
    "Links into the site that lead to no file, or to no such place on a page"
    for link in page.links:
        to = place(link, page.address)
        if to is None: continue
        path, anchor = to
        if (root/path).is_dir(): path = posixpath.normpath(posixpath.join(path, 'index.html'))
        if path.startswith('..') or not (root/path).is_file(): yield f'leads nowhere: {link}'
        elif anchor and path in pages and anchor not in pages[path].ids: yield f'no such place: {link}'


def foreign(page, root):
    "What is fetched from other hosts, also by the style sheets of the page; and what is fetched and not there"
    wanted = [(o, page.address) for o in page.fetched] + [(o, page.address) for o in in_css(page.style)]
    for o, _ in list(wanted):
        to = place(o, page.address)
        if to and to[0].endswith('.css') and (root/to[0]).is_file():
            wanted += [(u, to[0]) for u in in_css((root/to[0]).read_text(encoding='utf-8'))]
    for url, where in wanted:
        if url.startswith('data:') or url.startswith('#'): continue
        to = place(url, where)
        if is_foreign(url): yield f'is fetched from another host: {url}'
        elif to and not (root/to[0]).exists(): yield f'is fetched and not there: {url} ({where})'


def weights(page, root):
    "(bytes of the page with what only it has, bytes of what all pages share)"
    files = {to[0] for o in page.fetched if (to := place(o, page.address)) and (root/to[0]).is_file()}
    size = lambda names: sum((root/o).stat().st_size for o in names)
    shared = {o for o in files if o.startswith(SHARED)}
    return page.path.stat().st_size + size(files - shared), size(shared)


def head(page):
    "What should stand in the head of a page, and does not"
    wanted = ['og:title', 'og:description', 'og:image', 'twitter:card', 'twitter:image']
    yield from (f'no {o}' for o in wanted if not page.meta.get(o))
    if 'data:' in page.meta.get('og:image', ''):
        yield 'the picture of its card has no address'
        return
    image = place(page.meta.get('og:image', ''), page.address)
    if page.meta.get('og:image') and not page.meta['og:image'].startswith(HOME): yield 'og:image is no whole address'
    if image and not (page.path.parents[len(Path(page.address).parts) - 1]/image[0]).is_file():
        yield 'the picture of its card is not there'
    if not page.rel.get('canonical', '').startswith(HOME): yield 'no canonical address'
    if not any('icon' in o.split() for o in page.rel): yield 'no icon'


def search(root, names=()):
    "What is wrong with the index of the search; `names` should each have an entry with that title, before the others"
    path = root/'search.json'
    if not path.is_file(): return ['search.json is not there']
    entries = json.loads(path.read_text(encoding='utf-8'))
    there = {o.get('section') for o in entries[:len(names) or None]}
    return [f'search.json has no entry for {o}' for o in names if o not in there] + [
        f'search.json leads nowhere: {o["href"]}' for o in entries
        if not (root/o['href'].partition('#')[0]).is_file()]


def markdown(root):
    "What llms.txt names and is not there: it leads to each page as markdown"
    if not (root/'llms.txt').is_file(): return []
    urls = re.findall(rf'\({re.escape(HOME)}([^)]+)\)', (root/'llms.txt').read_text(encoding='utf-8'))
    return [f'llms.txt leads nowhere: {o}' for o in urls if not (root/o).is_file()]


def findings(root, names=()):
    "All that is wrong with a site, a line each"
    root = Path(root)
    pages = {p.relative_to(root).as_posix(): Page(p, root) for p in sorted(root.rglob('*.html'))
             if p.relative_to(root).parts[0] != SHARED}
    if not pages: return [f'{root} holds no page']
    found = [*search(root, names), *markdown(root)]
    for address, page in pages.items():
        own, shared = weights(page, root)
        top = address.split('/')[0]
        said = [*dead_links(page, pages, root), *foreign(page, root)]
        if top not in HEAVY and own > LIMIT: said.append(f'weighs {own / 1e6:.2f} MB, over {LIMIT / 1e6} MB')
        if shared > SHARED_LIMIT: said.append(f'shares {shared / 1e6:.2f} MB with others')
        if top not in NOT_QUARTO and address != '404.html': said += head(page)
        found += [f'{address}: {o}' for o in dict.fromkeys(said)]
    return found


if __name__ == '__main__':
    import pages as made
    found = findings(sys.argv[1], [name for name, _, _ in made.symbols()] if made.proc.exists() else [])
    print('\n'.join(found) or f'{sys.argv[1]}: nothing is wrong')
    sys.exit(bool(found))

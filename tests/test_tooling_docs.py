"""README and site, as far as they can be held without Quarto: what it is given is processed by nbdev, well formed and
complete. That Quarto then renders it is seen only where the site is built (.github/workflows/docs.yml), by
`test_built_site`."""
import ast
import html
import json
import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

import derive
import pandas as pd
import pytest
import yaml
from conftest import nb_id, notebooks, project_files, read_nb, root
from fastcore.nbio import mk_cell, write_nb
from nbdev.config import nbpath2html
from test_lab import browser_page

settings = derive.settings
laws = next(nb for nb, module in derive.modules() if module == 'perturb.laws')
pages = notebooks() + sorted(p for p in project_files() if p.suffix == '.md')


def test_readme():
    "README.md is made from nbs/index.ipynb, and starts with the two commands"
    assert (root/'README.md').read_text() == derive.readme(), 'run `make export`'
    text = (root/'README.md').read_text()
    assert 0 < text.index('make lab') < text.index('make test') < 2000
    assert '#|' not in text


def test_readme_can_fail(project):
    "A word changed in the notebook changes what README.md should be"
    nb = project/'nbs'/'index.ipynb'
    nb.write_text(nb.read_text().replace('make lab', 'make dinner', 1))
    assert (root/'README.md').read_text() != derive.readme(nb)


def landing(): return read_nb(root/'nbs'/'index.ipynb').cells[1]


def test_landing_explorer():
    "The front page shows the explorer right below its title; README.md, where no script runs, has nothing of it"
    assert re.fullmatch(r'<div class="noisyseg-explorer" data-src="explorer/"></div>\n<script '
                        r'type="module">\n.*</script>', landing().source, re.S)
    assert "from './explorer/explorer.js'" in landing().source
    text = (root/'README.md').read_text()
    assert '<script' not in text and 'noisyseg-explorer' not in text and '{=html}' not in text


def test_landing_explorer_can_fail(tmp_path):
    "What only the site can show is left out of README.md in each spelling; an example in a code block stays"
    nb, script = read_nb(root/'nbs'/'index.ipynb'), '<script type="module">go()</script>'
    nb.cells[1].source = f'Shown. Said.\n\n```html\n{script}\n```'
    nb.cells[2].source += f'\n\n```{{=html}}\n{script.replace("go", "secret")}\n```\n\nLast words.'
    nb.cells[3:3] = [mk_cell('raw secret', 'raw'), mk_cell(script.replace('go', 'secret'), 'markdown')]
    write_nb(nb, tmp_path/'index.ipynb')
    text = derive.readme(tmp_path/'index.ipynb')
    assert 'secret' not in text and script in text and 'Last words.' in text


def llms_links(text): return re.findall(r'\]\((\S+?)\)', text)


def test_llms_txt():
    "nbs/llms.txt is made from the notebooks, and names each of them"
    text = (root/'nbs'/'llms.txt').read_text()
    assert text == derive.llms_txt(), 'run `make export`'
    assert sorted(llms_links(text)) == sorted(derive.page_url(nb_id(p)) for p in notebooks())
    assert len(text) < 24_000


def test_llms_txt_can_fail(project):
    "A notebook without its line of description is said to lack it"
    nb = project/'nbs'/laws
    name, description = derive.title(nb)
    assert name and description
    nb.write_text(nb.read_text().replace(f'> {description[:15]}', description[:15], 1))
    with pytest.raises(ValueError, match='_laws.*one line of description'): derive.title(nb)


def listed(o):
    "All notebooks named in a piece of _quarto.yml"
    if isinstance(o, dict): return [p for v in o.values() for p in listed(v)]
    if isinstance(o, list): return [p for v in o for p in listed(v)]
    return [o] if isinstance(o, str) and o.endswith('.ipynb') else []


def test_quarto_yml():
    "It parses, nbdev finds it in nbs/, and its sidebars, one a section, list every notebook but the front page once"
    cfg = yaml.safe_load((root/'_quarto.yml').read_text())
    assert (root/'_quarto.yml').read_text() == derive.quarto_yml(), 'run `make export`'
    assert (root/'nbs'/'_quarto.yml').is_symlink() and (root/'nbs'/'_quarto.yml').resolve() == root/'_quarto.yml'
    assert cfg['project']['output-dir'] == '_docs'
    sidebars = cfg['website']['sidebar']
    assert [o['id'] for o in sidebars] == derive.SECTIONS
    side = listed(sidebars)
    assert sorted(side) == sorted(nb_id(p) for p in notebooks() if nb_id(p) != 'index.ipynb')
    navbar = listed(cfg['website']['navbar'])
    assert len(navbar) == len(sidebars)
    # Quarto marks the first link of the navigation bar that it finds in a page's sidebar: so each has one of its own
    for link in navbar: assert sum(link in listed(o) for o in sidebars) == 1


def test_sidebar_shows_modules():
    "A notebook that exports a module stands in the sidebar under the module's name"
    shown = {pair for section in derive.sections().values() for folder in section.values() for pair in folder}
    assert {(nb, module.rsplit('.')[-1]) for nb, module in derive.modules()} <= shown


# Quarto refuses a key it does not know under `project`, `website` and what is in them, and silently ignores one
# elsewhere.
# These are keys of its reference (quarto.org/docs/reference, projects/websites and formats/html), by where they may
# stand.
nav = 'text href icon aria-label menu'
known = {
    '': 'project format execute website',
    'project': 'title type render execute-dir output-dir lib-dir resources brand preview pre-render post-render',
    'format': 'html commonmark',
    'format.html': 'theme css keep-md toc toc-depth toc-expand code-copy code-tools include-in-header '
                   'include-before-body include-after-body format-links canonical-url html-math-method '
                   'respect-user-color-scheme link-external-newwindow lightbox',
    'format.html.theme': 'light dark',
    'format.html.format-links': 'format text icon',
    'execute': 'enabled freeze cache echo',
    'website': 'title description favicon site-url site-path repo-url repo-subdir repo-branch repo-actions issue-url '
               'search navbar sidebar body-header '
               'body-footer margin-header margin-footer page-navigation back-to-top-navigation bread-crumbs '
               'page-footer image image-alt open-graph '
               'twitter-card llms-txt reader-mode announcement',
    'website.twitter-card': 'title description image image-alt image-height image-width creator site card-style',
    'website.open-graph': 'title description image image-alt image-height image-width locale site-name',
    'website.navbar': 'title logo logo-alt logo-href background foreground search pinned collapse collapse-below left '
                      'right',
    'website.navbar.left': nav, 'website.navbar.left.menu': nav, 'website.navbar.right': nav,
    'website.navbar.right.menu': nav,
    'website.sidebar': 'id title logo search tools contents style background foreground border alignment '
                       'collapse-level pinned header footer',
    'website.sidebar.contents': 'section text href icon contents',
    'website.sidebar.contents.contents': 'section text href icon contents'}


def unknown(o, at=''):
    "The keys in a piece of _quarto.yml that Quarto's reference does not have there"
    if isinstance(o, list): return [k for v in o for k in unknown(v, at)]
    if not isinstance(o, dict): return []
    here = {k: f'{at}.{k}'.strip('.') for k in o}
    return [p for k, p in here.items() if k not in known.get(at, '').split()] + [k for v,
            p in zip(o.values(), here.values()) for k in unknown(v, p)]


def quarto_yml(): return yaml.safe_load((root/'_quarto.yml').read_text())


def test_quarto_keys():
    "Each key is one that Quarto knows, and the facts are those of settings.ini"
    cfg = quarto_yml()
    assert not unknown(cfg)
    site = cfg['website']
    assert [site[k] for k in ('title', 'description', 'site-url', 'repo-url', 'repo-branch')] == \
        [settings[k] for k in ('lib_name', 'description', 'doc_url', 'git_url', 'branch')]
    assert set(cfg['format']['html']['theme']) == {'light', 'dark'} and site['navbar']['search'] is True


def test_quarto_keys_can_fail():
    "A misspelt key is found where it stands, in lists too"
    cfg = quarto_yml()
    cfg['website']['repo_subdir'] = cfg['website'].pop('repo-subdir')
    cfg['website']['navbar']['left'][0]['url'] = 'x'
    assert unknown(cfg) == ['website.repo_subdir', 'website.navbar.left.url']


def source_url(cfg, page):
    "Where Quarto's \"View source\" leads from a page"
    site = cfg['website']
    return '/'.join([site['repo-url'], 'blob', site['repo-branch'], *filter(None, [site.get('repo-subdir')]), page])


def lost(cfg):
    "The notebooks whose \"View source\" leads to nothing that is in the project"
    start, files = f'{settings["git_url"]}/blob/{settings["branch"]}/', set(project_files())
    urls = [source_url(cfg, nb_id(p)) for p in notebooks()]
    return [u for u in urls if not u.startswith(start) or root/u.removeprefix(start) not in files]


def test_source_links():
    "\"View source\", and with it \"Open in Colab\", leads from each page to its notebook"
    cfg = quarto_yml()
    assert 'source' in cfg['website']['repo-actions'] and not lost(cfg)
    assert len(lost({**cfg, 'website': {**cfg['website'], 'repo-subdir': 'docs'}})) == len(notebooks())


page_html = """<!doctype html><header id="title-block-header"><h1>A page</h1></header>
<nav role="doc-toc"><div class="toc-actions"><ul>
<li><a class="toc-action" href="{source}">View source</a></li></ul></div></nav>
<main>text</main>
{script}"""


@pytest.fixture(scope='module')
def tab(tmp_path_factory):
    "A page of one browser for all"
    with browser_page(tmp_path_factory.mktemp('profile')) as tab: yield tab


@pytest.mark.parametrize('page', [laws, 'tutorials/tour.ipynb', None], ids=str)
def test_page_links(page, tab, tmp_path):
    "On a page as Quarto lays it out: links to Binder and Colab; none where no source is named"
    source = source_url(quarto_yml(), page) if page else 'https://github.com/noisyseg/noisyseg/issues/new'
    file = tmp_path/'page.html'
    file.write_text(page_html.format(source=source, script=(root/'nbs'/'page_links.html').read_text()))
    tab.complaints.clear()
    tab.goto(file.as_uri())
    tab.wait_for_function('document.readyState == "complete"')
    colab = [a.get_attribute('href') for a in tab.query_selector_all('#title-block-header .open-in-colab a')]
    assert not tab.complaints
    assert colab == ([] if page is None else [
        f'https://mybinder.org/v2/gh/noisyseg/noisyseg/main?labpath={quote(f"nbs/{page}", safe="")}',
        f'https://colab.research.google.com/github/noisyseg/noisyseg/blob/main/nbs/{page}'])


def test_workflows():
    "They parse, and do what people do on the command line"
    read = lambda name: yaml.safe_load((root/'.github'/'workflows'/name).read_text())['jobs']
    steps = {name: [o.get('run') for job in read(name).values() for o in job['steps']]
             for name in ('test.yml', 'docs.yml')}
    assert '.ci/run' in steps['test.yml'] and '.ci/lowest' in steps['test.yml']
    assert read('test.yml')['test']['strategy']['matrix']['python'] == settings['tested_pythons'].split()
    docs = read('docs.yml')['publish']['steps']
    done = [o.get('run') or o['uses'].split('@')[0] for o in docs]
    order = [done.index(o) for o in ('make docs', 'make live LIVE=_docs/live', 'make docs-check',
                                     'actions/upload-pages-artifact')]
    assert order == sorted(order)
    assert docs[done.index('make docs-check')]['env'] == {'NOISYSEG_SITE': '_docs'}
    quarto = docs[done.index('quarto-dev/quarto-actions/setup')]
    assert re.fullmatch(r'\d+[.]\d+[.]\d+', quarto['with']['version'])
    assert '.ci/check_site.py _docs' in (root/'Makefile').read_text()
    assert re.search(r'^make test\b', (root/'.ci'/'run').read_text(), re.M)


def test_index_says_where_to_go():
    "The front page leads into each subpackage, and to every tutorial and study"
    text = '\n'.join(c.source for c in read_nb(root/'nbs'/'index.ipynb').cells if c.cell_type == 'markdown')
    there = set(re.findall(r'\]\(([\w/]+\.ipynb)', text))
    assert {o.split('/')[0] for o in there} >= set(derive.SECTIONS)
    assert not {nb_id(p) for p in notebooks() if p.parent.name in ('tutorials', 'studies')} - there


def package_names():
    "All that has a name in noisyseg: functions, classes, parameters, attributes"
    names = set()
    for p in (root/'noisyseg').rglob('*.py'):
        for o in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            if isinstance(o, (ast.FunctionDef, ast.ClassDef)): names.add(o.name)
            elif isinstance(o, ast.arg): names.add(o.arg)
            elif isinstance(o, ast.Name) and isinstance(o.ctx, ast.Store): names.add(o.id)
            elif isinstance(o, ast.Attribute) and isinstance(o.ctx, ast.Store): names.add(o.attr)
    return names


def dead_words(text):
    "What stands in backticks in the recipes, and neither is a file nor has a name in the package"
    recipes = text.partition('## Four recipes')[2].partition('\n## ')[0]
    folder, names = root, package_names()
    for code in re.findall(r'`([^`]+)`', recipes):
        if re.search(r'[.](ipynb|py)$', code):
            found = root/code if '/' in code else folder/code
            folder = found.parent
            if not found.exists(): yield code
        elif (word := re.search(r'\w+', code)[0]) not in names: yield word


def test_recipes_name_what_exists():
    "Every notebook and every name in CONTRIBUTING's four recipes"
    text = (root/'CONTRIBUTING.md').read_text(encoding='utf-8')
    assert list(dead_words(text)) == []
    first = re.findall(r'\n- (?:For a corruption r|R)ead [^`\n]*`(nbs/[^`]+[.]ipynb)`', text)
    assert len(first) == 5
    for o in first: assert any(c.source.startswith('## Write yours') for c in read_nb(root/o).cells), o


def test_recipes_can_fail():
    "A notebook that was renamed and a function that is gone are found"
    text = 'Read `nbs/perturb/99_nowhere.ipynb`, call `no_such_function(x)`, then `sweep(x)`.'
    found = list(dead_words(f'## Four recipes\n\n{text}\n\n## Else'))
    assert found == ['nbs/perturb/99_nowhere.ipynb', 'no_such_function']


def result_rows():
    "The rows of the table in README.md, from the study's file"
    df = pd.read_csv(root/'nbs'/'studies'/'voc_weight_noise.csv')
    df = df[(df.metric == 'mIoU') & (df.disturbance == 'relative')]
    for model, name in {'clean': 'clean', 'middle': 'under 2 % noise', 'high': 'under 3 % noise'}.items():
        cells = []
        for level in 0, .01, .02, .03:
            seeds = 100 * df[(df.model == model) & (df.level == level)].groupby('train_seed').value.mean()
            cells.append(f'{seeds.mean():.1f} ({", ".join(f"{v:.1f}" for v in seeds)})')
        yield f'| {" | ".join([name, *cells])} |'


def test_results_on_the_front_page():
    "The one table of results in README.md holds the numbers of the study, and so does what is said of it"
    text = (root/'README.md').read_text()
    assert '\n'.join(result_rows()) in text
    df = pd.read_csv(root/'nbs'/'studies'/'voc_weight_noise.csv')
    df = df[(df.metric == 'mIoU') & (df.disturbance == 'relative')]
    means = 100 * df.groupby(['level', 'train_seed', 'model']).value.mean().unstack()
    gains = (means['middle'] - means['clean']).unstack().loc[[0, .02, .03]]
    cost, some, more = gains.mean(axis=1).round(1)
    assert f'costs {-cost} points where there is none, and gains {some} points at 2 % and {more} at 3 %' in ' '.join(
        text.split())
    assert gains.shape == (3, 3) and (gains.loc[0] < 0).all() and (gains.loc[[.02, .03]] > 0).all(axis=None)
    by_high = (means['high'] - means['clean']).loc[.02].round(1)
    assert f'the {by_high.mean():.1f} points that training under 3 % gains at 2 %' in ' '.join(text.split())
    assert len(text.splitlines()) <= 150


def in_project(link):
    "What a link in README.md shows: there they are absolute, because a package index shows it too"
    for kind in 'blob', 'raw':
        link = link.removeprefix(f'{settings["git_url"]}/{kind}/{settings["branch"]}/')
    page = link.removeprefix(f'{settings["doc_url"]}/')
    return {nbpath2html(nb_id(p)).as_posix(): f'nbs/{nb_id(p)}' for p in notebooks()}.get(page, link)


def test_readme_links_are_absolute():
    "Pictures and links of README.md work where nothing else of the project is, and lead to what is there"
    found = [o for pair in links(root/'README.md') for o in pair if o]
    assert not [o for o in found if not re.match(r'https://|#', o)]
    made = [f'{settings["doc_url"]}/live/{o}' for o in ('', 'photos/')]   # by `make live`, when the site is built
    ours = [in_project(o) for o in found if o.startswith((settings['git_url'], settings['doc_url'])) and o not in made]
    files = set(project_files())
    assert len(ours) > 10 and not [o for o in ours if root/o.partition('#')[0] not in files]
    assert [o for o in found if o.endswith('.png') and '/raw/' in o]


def markdown(path):
    "The markdown of a page, without code"
    text = path.read_text() if path.suffix == '.md' else '\n\n'.join(c.source for c in read_nb(path).cells
            if c.cell_type == 'markdown')
    return re.sub(r'`[^`\n]+`', '', re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.M | re.S))


def anchors(path):
    "The anchors of a page: its headings as GitHub and Quarto spell them"
    slug = lambda h: re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', re.sub(r'\]\([^)]*\)', '', h)).strip().lower())
    return {slug(h) for h in re.findall(r'^#+ (.+)$', markdown(path), re.M)}


def links(path):
    return re.findall(r'\]\(<?([^)>\s]+)>?(?:\s+"[^"]*")?\)|(?<![\w-])(?:src|href)="([^"]+)"', markdown(path))


@pytest.mark.parametrize('path', pages, ids=lambda p: str(p.relative_to(root)))
def test_links(path):
    "Each link and picture that stays inside the project points at something that is there, and is tracked"
    files, bad = set(project_files()), []
    for link in filter(None, (o for pair in links(path) for o in pair)):
        if re.match(r'[a-z]+:', link): continue
        target, _, anchor = unquote(link).partition('#')
        to = (path.parent/target).resolve() if target else path
        if not (to in files or (to.is_dir() and root in (to, *to.parents))): bad.append(link)
        elif anchor and to.suffix in ('.ipynb', '.md') and anchor not in anchors(to): bad.append(link)
    assert not bad


def test_links_can_fail(tmp_path):
    "Links are found in their spellings, and not in code"
    page = tmp_path/'a.md'
    page.write_text('# A b\n[x](one.ipynb) ![y](two.png "title") <img src="three.png"> `[no](z)`\n```\n[no](z)\n```\n')
    assert [a or b for a, b in links(page)] == ['one.ipynb', 'two.png', 'three.png'] and anchors(page) == {'a-b'}


@pytest.fixture(scope='module')
def as_page():
    "nbconvert's way from a notebook to HTML, without style sheets and colours; it compiles its templates once"
    from nbconvert import HTMLExporter  # here, since it takes seconds to import
    # colours take four fifths of the time
    def uncoloured(source, **kwargs): return f'<pre>{html.escape(source)}</pre>'
    exporter = HTMLExporter(template_name='basic', filters=dict(highlight_code=uncoloured))
    return lambda nb: exporter.from_notebook_node(nb)[0]


@pytest.mark.parametrize('path', notebooks(), ids=nb_id)
def test_page_converts(path, processed, as_page):
    "Each processed notebook is there, and is a notebook that nbconvert can show, with no directive left in it"
    import nbformat  # here, since it takes seconds to import
    page = processed/nb_id(path)
    nb = json.loads(page.read_text())
    nb['metadata'].pop('execution', None)                # nbdev's own marks, which nbformat's schema does not know
    for c in nb['cells']: c.pop('has_sd', None), c['metadata'].pop('execution', None)
    nb = nbformat.reads(json.dumps(nb), as_version=4)
    nbformat.validate(nb)
    assert len(as_page(nb)) > 1000
    exported = [c.source for c in nb.cells if re.search(r'^#\| *export', c.source, re.M)]
    assert not exported


def test_site_is_complete(processed):
    "_quarto.yml went along as a file, and so did the pictures"
    assert (processed/'_quarto.yml').read_text() == (root/'_quarto.yml').read_text()
    pictures = [p.relative_to(root/'nbs') for p in (root/'nbs').rglob('*.png') if '.ipynb_checkpoints' not in p.parts]
    assert all((processed/p).exists() for p in pictures)


def front(page):
    "The front matter that nbdev gave a page"
    return yaml.safe_load(next(c['source'] for c in read_nb(page).cells if c.cell_type == 'raw').strip().strip('-'))


def test_page_names(processed):
    "llms.txt, and whoever links to a page, has the names that nbdev gives them; no two are the same"
    names = {}
    for p in notebooks():
        page = processed/nb_id(p)
        names[p] = str((page.parent/front(page)['output-file']).relative_to(processed))
    assert names == {p: str(nbpath2html(nb_id(p))) for p in notebooks()}
    assert len(set(names.values())) == len(names)


def named_files(cfg):
    "What _quarto.yml names that must be there as a file: links of navbar and sidebar, style sheet, included HTML"
    def texts(o):
        if isinstance(o, dict): o = [v for k, v in o.items() if k not in ('id', 'title', 'text', 'section')]
        return [t for v in o for t in texts(v)] if isinstance(o, list) else [o]
    html = cfg['format']['html']
    found = texts([cfg['website']['navbar'], cfg['website']['sidebar'], html['css'], html['include-after-body'],
                   html['theme'], cfg['website']['favicon'], cfg['website']['image']])
    return sorted({o for o in found if isinstance(o, str) and not re.match(r'[a-z]+:', o)
                   and re.search(r'\.[a-z]+$', o)})


def unmatched(cfg, folder):
    "The patterns under `resources` that no file matches, and the files named that are not there"
    is_there = lambda pattern: any(p.is_file() and not p.is_symlink()
                                   for p in folder.glob(pattern.replace('**', '**/*')))
    return [o for o in cfg['project']['resources'] if not is_there(o)] + [o for o in named_files(cfg)
            if not (folder/o.removeprefix('/')).is_file()]


def test_resources(processed):
    "What _quarto.yml wants copied and what it links to came along, as files"
    assert not unmatched(quarto_yml(), processed)


def test_resources_can_fail(tmp_path):
    "In an empty folder all of it is missing"
    missing = unmatched(quarto_yml(), tmp_path)
    assert {'images/**', 'explorer/**', 'figures/**', 'llms.txt', 'explorer/index.html', 'styles.css', 'results.md',
            'page_links.html', 'live_figures.html', 'fonts.scss', 'images/favicon.svg',
            'tutorials/tour.ipynb'} <= set(missing)
    (tmp_path/'images').mkdir()
    (tmp_path/'images'/'hero.png').touch()
    assert 'images/**' not in unmatched(quarto_yml(), tmp_path)


def test_landing_is_processed(processed):
    ("nbdev hands the front page's explorer on word for word, and what it asks for is there, the link to explorer.js "
     "as a file")
    first = [c.source for c in read_nb(processed/'index.ipynb').cells if c.cell_type == 'markdown'
             and not c.source.startswith('<!--')][0]
    assert first == landing().source
    assert (processed/'explorer'/'manifest.json').is_file() and not (processed/'explorer'/'explorer.js').is_symlink()
    source = processed.parent/'noisyseg'/'show'/'explorer.js'
    assert (processed/'explorer'/'explorer.js').read_bytes() == source.read_bytes()


if site := os.environ.get('NOISYSEG_SITE'):  # the folder of the built site: a test only where there is one
    def test_built_site():
        ("In what Quarto made: every page as HTML and as markdown with its source link, the explorer, the search "
         "index, llms.txt and what that links to")
        built, cfg, bad = root/site, quarto_yml(), []
        for p in notebooks():
            page = built/nbpath2html(nb_id(p))
            if not page.is_file() or not Path(f'{page}.md').is_file(): bad.append(str(page))
            elif source_url(cfg, nb_id(p)) not in page.read_text(): bad.append(f'no source link: {page}')
        bad += [o for o in llms_links((built/'llms.txt').read_text())
                if not (built/o.removeprefix(settings['doc_url'] + '/')).is_file()]
        assert not bad
        text = (built/'index.html').read_text()
        assert 'data-src="explorer/"' in text and "from './explorer/explorer.js'" in text
        assert 'open-in-colab' in text and (built/'search.json').is_file()
        assert all((built/'live'/o).is_file() for o in ('index.html', 'manifest.json', 'live.js'))   # by `make live`
        made = {p.relative_to(root/'nbs') for p in (root/'nbs'/'explorer').rglob('*') if p.is_file()}
        assert made and all((built/p).read_bytes() == (root/'nbs'/p).read_bytes() for p in made)

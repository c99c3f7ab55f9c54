"Hands the facts in settings.ini to setuptools: every field that pyproject.toml calls dynamic is set here."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
cfg = ConfigParser(delimiters=['='])
cfg.read(here/'settings.ini', encoding='utf-8')
cfg = cfg['DEFAULT']
readme = here/'README.md'


def lines(key): return [o.strip() for o in cfg.get(key, '').splitlines() if o.strip()]


stages = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}

setup(
    version=cfg['version'],
    keywords=cfg['keywords'].split(),
    license_expression=cfg['license'],
    long_description=readme.read_text(encoding='utf-8') if readme.exists() else cfg['description'],
    long_description_content_type='text/markdown',
    classifiers=[
        f'Development Status :: {cfg["status"]} - {stages[cfg["status"]]}',
        'Intended Audience :: Science/Research',
        'Intended Audience :: Developers',
        'Framework :: Jupyter',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3 :: Only',
        *(f'Programming Language :: Python :: {o}' for o in cfg['tested_pythons'].split()),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
    install_requires=lines('requirements'),
    extras_require={k.removesuffix('_requirements'): lines(k) for k in cfg if k.endswith('_requirements')},
    entry_points={'console_scripts': lines('console_scripts'),
                  'nbdev': [f'{cfg["lib_name"]} = {cfg["lib_name"]}._modidx:d']},
    packages=find_packages(include=['noisyseg', 'noisyseg.*']),
    package_data={'noisyseg.show': ['*.js', '*.html', 'models/*'], 'noisyseg.perturb': ['profiles/*.json']},
)

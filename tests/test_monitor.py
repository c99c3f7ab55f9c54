"The monitor as people meet it: in a real JupyterLab and a real browser, ended by a click on Stop."
import json

import pytest
from test_lab import cells_of, ours, start_notebook, wait_until, write_notebook

FIT = '''
from noisyseg import *
from noisyseg.train.losses import DeepSupervisionLoss, HybridLoss
dls = scenes(n_train=48, n_valid=16, size=64, seed=0)
monitor = TrainingMonitor(interval=0.1)
learn = segmentation_learner(dls, unet3plus_tiny, MaxGaussian(0.1),
                             loss_func=DeepSupervisionLoss(HybridLoss(msssim=0)), cbs=monitor,
                             arch_args=dict(upsample='after', deep_supervision=False))
with learn.no_bar(), learn.no_logging(): learn.fit(500)
'''
AFTER = '''
import json
stopped = dict(state=monitor.state, batches=monitor._batch, injected=learn.weight_noise._clone.injected,
               rows=len(monitor.history))
with learn.no_bar(), learn.no_logging(): learn.fit(1)
print(json.dumps({**stopped, 'then': monitor.state, 'further': monitor._batch - stopped['batches']}))
'''


@pytest.mark.timeout(240)
def test_stop_in_jupyterlab(in_jupyterlab):
    ("Curves and masks appear and change while the fit runs; a click on Stop ends it; the learner goes on from clean "
     "weights")
    project, page, url, token = in_jupyterlab
    write_notebook(project/'nbs'/'stop.ipynb', FIT, AFTER)
    page.complaints.clear()
    page.set_viewport_size(dict(width=900, height=1000))
    start_notebook(page, url, token, 'nbs/stop.ipynb')
    stop = page.get_by_role('button', name='Stop', exact=True).first
    stop.wait_for(timeout=60_000)
    wait_until(page, '''() => {
        const lines = [...document.querySelectorAll(".js-plotly-plot .scatterlayer path.js-line")]
        return lines.length >= 3 && lines.every(p => p.getAttribute("d").length > 20)
    }''')
    picture = page.locator('img[alt^="Mask predicted with noisy weights"]').first
    seen = picture.get_attribute('src')
    wait_until(page, 'seen => document.querySelector(`img[alt^="Mask predicted with noisy weights"]`).src !== seen',
               arg=seen)
    assert page.locator('progress[aria-label="Progress of the fit"]').first.evaluate('p => p.value') < 0.9
    assert page.get_by_role('status').filter(has_text='training').count() == 1
    size = page.locator('.js-plotly-plot').first.evaluate('p => [p._fullLayout.width, '
                                                          'p.closest(".jp-OutputArea-output").clientWidth]')
    assert size[0] <= size[1] + 1, f'curves {size[0]} pixels wide where there are {size[1]}'
    assert page.evaluate('() => window.outcome') is None
    stop.click()
    wait_until(page, '() => window.outcome !== null')
    last = cells_of(page)[1]['outputs'][-1]
    assert last['output_type'] == 'stream', last
    told = json.loads(last['text'])
    assert told['state'] == 'stopped' and told['batches'] < 1500 and not told['injected'], told
    assert told['then'] == 'finished' and told['further'] == 3, told
    page.get_by_role('status').filter(has_text='finished').first.wait_for(timeout=10_000)
    assert stop.is_disabled()
    assert not ours(page.complaints)

PSEUDO = '''
from noisyseg import *
from noisyseg.data.semi_supervised import semi_scenes
from noisyseg.train.methods.mlpmatch import semi_learner
from noisyseg.data.procedural import scene
from noisyseg.show.pseudo_label_panel import PseudoLabelPanel
import numpy as np
dls = semi_scenes(n_labelled=4, n_unlabelled=8, n_valid=4, size=32, bs=4, seed=0)
dls.train.dataset.labelled.vocab[:] = ['<img src=x onerror="window.broken=1">', *dls.vocab[1:]]
truth = [scene(np.random.default_rng([0, 0, 4 + i]), 32)[1] for i in range(8)]
monitor = TrainingMonitor(interval=0.1, panels=PseudoLabelPanel(2, truth))
learn = semi_learner(dls, level='mlpmatch', threshold=0.4, seed=0, cbs=monitor)
with learn.no_bar(), learn.no_logging(): learn.fit(500, 3e-3)
'''
SEEN = '''
import json
shares = monitor.history.query("metric in @PseudoLabelPanel.curves")
print(json.dumps(dict(state=monitor.state, metrics=sorted(set(shares.metric)),
                      inside=bool(shares.value.dropna().between(0, 1).all()))))
'''


@pytest.mark.timeout(240)
def test_pseudo_labels_in_jupyterlab(in_jupyterlab):
    ("Pseudo-labels, their confidence and their curves appear and change while MLPMatch trains, and a class's name is "
     "text, whatever is in it")
    project, page, url, token = in_jupyterlab
    write_notebook(project/'nbs'/'pseudo_labels.ipynb', PSEUDO, SEEN)
    page.complaints.clear()
    page.set_viewport_size(dict(width=1000, height=1300))
    start_notebook(page, url, token, 'nbs/pseudo_labels.ipynb')
    picture = page.locator('img[alt^="Pseudo-label of image 4"]').first
    picture.wait_for(timeout=120_000)
    seen = picture.get_attribute('src')
    wait_until(page, 'seen => document.querySelector(`img[alt^="Pseudo-label of image 4"]`).src !== seen', arg=seen)
    wait_until(page, '() => document.querySelectorAll(".js-plotly-plot .scatterlayer path.js-line").length >= 5')
    assert page.locator('img[alt^="Confidence in image"]').count() == page.locator(
            'img[alt^="True mask of image"]').count() == 2
    assert 'τ = 0.4' in page.locator('body').inner_text() and '<img src=x onerror=' in page.locator(
            'body').inner_text()
    assert page.evaluate('() => window.broken') is None
    edges = ('l => l.map(i => [i.getBoundingClientRect().right, '
             'i.closest(".jp-OutputArea-output").getBoundingClientRect().right])')
    wide = page.locator('img[alt^="Pseudo-label of image"]').evaluate_all(edges)
    assert all(a <= b + 1 for a, b in wide), wide
    page.get_by_role('button', name='Stop', exact=True).first.click()
    wait_until(page, '() => window.outcome !== null')
    last = cells_of(page)[1]['outputs'][-1]
    assert last['output_type'] == 'stream', last
    told = json.loads(last['text'])
    assert told == dict(state='stopped', metrics=['confident', 'pseudo-labels, confident', 'pseudo-labels, right'],
                        inside=True), told
    assert not ours(page.complaints)
